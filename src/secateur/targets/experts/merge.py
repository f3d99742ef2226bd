"""Removed experts merged into those that stay: who takes over from whom, and the averaged weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur.calibration import Calibration
from secateur.common.assignment import best_assignment
from secateur.common.models import evaluating
from secateur.targets.experts.blocks import Block
from secateur.targets.experts.down import Down, inputs_of
from secateur.targets.experts.neurons import Neurons, neurons_of, output_of, tensors_of
from secateur.targets.experts.routing import Call, Routed, watching

SHARES = (0.25, 0.5, 1.0)
"""How much of a removed expert's weight counts in the average; 0, which is also tried, drops it."""

TOKENS = 2048
"""Most tokens of a block on which experts are compared."""

_EACH = 128


@dataclass
class Heirs:
    """What one block's tokens say of its experts.

    Attributes:
        block: The dense block.
        kept: Numbers of the experts that stayed.
        weight: For each expert the sum of its router weights over all tokens. [experts]
        heir: For each removed expert that some token uses, the expert that stayed and is nearest to it.
        down: The dense experts' down-projections.
    """

    block: Block
    kept: list[int]
    weight: Tensor
    heir: dict[int, int]
    down: Down


def heirs(
    model: nn.Module, blocks: Sequence[Block], kept: Mapping[str, list[int]], data: Calibration
) -> list[Heirs]:
    r"""Who takes over from each removed expert.

    That is the expert h that stayed for which replacing the removed r by h changes least on r's own tokens:
    the sum of :math:`g_r(t)^2 \lVert f_r(x_t) - f_h(x_t) \rVert^2`. It has as many neurons; if none that
    stayed has, as after neurons of single experts were removed, the expert is dropped.
    """
    seen: dict[str, _Seen] = {}

    def watch(call: Call, routed: Callable[[], Routed]) -> None:
        name, found = call.block.name, routed()
        if name not in seen:
            seen[name] = _Seen(model, call.block, found)
        seen[name].add(found)

    with evaluating(model), torch.no_grad(), watching(model, blocks, watch):
        for batch in data.batches():
            batch.run(model)
    with evaluating(model), torch.no_grad():
        return [found.heirs(model, kept[name]) for name, found in seen.items()]


class _Seen:
    def __init__(self, model: nn.Module, block: Block, routed: Routed) -> None:
        self._block, self._parts, self._count = block, list[Routed](), 0
        self._weight = routed.hidden.new_zeros(block.count, dtype=torch.float64)
        self._down, _ = inputs_of(model, block, routed)

    def add(self, routed: Routed) -> None:
        valid = routed.valid
        self._weight.index_add_(0, routed.index[valid].long(), routed.weight[valid].double().abs())
        if self._count < TOKENS:
            some = torch.arange(len(routed.hidden), device=valid.device)
            some = some[:: max(1, len(some) // _EACH)][: min(_EACH, TOKENS - self._count)]
            self._parts.append(routed.only(some))
            self._count += len(some)

    def heirs(self, model: nn.Module, kept: list[int]) -> Heirs:
        found = {}
        hidden = torch.cat([part.hidden for part in self._parts])
        most = max(
            part.index.shape[1] for part in self._parts
        )  # batches may differ in the most that a token uses
        index, weight, valid, output = (
            torch.cat([_wider(getattr(part, field), most) for part in self._parts])
            for field in ("index", "weight", "valid", "output")
        )
        shapes = [
            [tensor.shape for tensor in tensors_of(model, self._block, expert).values()]
            for expert in range(self._block.count)
        ]
        for removed in sorted(set(range(self._block.count)) - set(kept)):
            tokens, slots = torch.where((index == removed) & valid)
            alike = [h for h in kept if shapes[h] == shapes[removed]]
            if len(tokens) and alike:
                x, wanted = hidden[tokens], output[tokens, slots].double()
                factor = weight[tokens, slots].double().square()
                change = [
                    float(factor @ (wanted - output_of(model, self._block, h, x)).square().sum(1))
                    for h in alike
                ]
                found[removed] = alike[int(np.argmin(change))]
        return Heirs(self._block, kept, self._weight, found, self._down)


def _wider(slots: Tensor, count: int) -> Tensor:
    """The slots of each token, and empty ones up to `count`. [tokens, count, ...]"""
    return torch.cat([slots, slots.new_zeros(len(slots), count - slots.shape[1], *slots.shape[2:])], 1)


def merge(small: nn.Module, model: nn.Module, block: Heirs, share: float) -> None:
    """Average the weights of the experts that stayed with those that they take over from, in place.

    The neurons of each removed expert are put in the order of its heir's first: the assignment with the
    largest sum of inner products of all numbers that belong to a neuron, each tensor scaled to norm 1. The
    average weighs each expert by the sum of its router weights, the removed ones times `share`.

    Args:
        small: The pruned model, which is changed.
        model: The dense model.
        block: Who takes over from whom.
        share: From 0, which changes nothing, to 1.
    """
    own = replace(block.block, count=len(block.kept))
    layout: Neurons | None = None
    for position, heir in enumerate(block.kept):
        members = [removed for removed, its in block.heir.items() if its == heir]
        if not members or not share:
            continue
        if layout is None or not block.block.fused:
            layout = neurons_of(model, block.block, block.down, heir)
        target = tensors_of(small, own, position)
        kept = tensors_of(model, block.block, heir)
        rest = [tensors_of(model, block.block, r) for r in members]
        orders = [_order(layout, kept, other) for other in rest]
        weights = [float(block.weight[heir]), *(share * float(block.weight[r]) for r in members)]
        for name, tensor in target.items():
            if layout.axes[name] is None:
                parts = [kept[name], *(other[name] for other in rest)]
                tensor.data.copy_(_mean(parts, weights).to(tensor.dtype))
            else:
                parts = [layout.rows(name, kept[name].data)]
                parts += [layout.rows(name, o[name].data)[p] for o, p in zip(rest, orders, strict=True)]
                layout.write(name, tensor.data, _mean(parts, weights))


def _mean(parts: list[Tensor], weights: list[float]) -> Tensor:
    total = torch.stack([w * part.detach().double() for w, part in zip(weights, parts, strict=True)]).sum(0)
    return total / sum(weights)


def _order(layout: Neurons, one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> Tensor:
    """Which of the other expert's neurons belongs to each neuron of the first. [inner]"""
    alike: Any = 0
    for name, axis in layout.axes.items():
        if axis is not None:
            a, b = (layout.rows(name, t[name].detach().double()) for t in (one, other))
            alike = alike + (a @ b.T) / (a.norm() * b.norm()).clamp_min(1e-300)
    return torch.as_tensor(best_assignment(alike.cpu().numpy()), device=alike.device)
