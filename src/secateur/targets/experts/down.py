"""The last linear layer of each expert: its weights and its inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import SettingError
from secateur.targets.experts.blocks import Block
from secateur.targets.experts.routing import Routed


@dataclass(frozen=True)
class Down:
    """The down-projections of a block's experts.

    Attributes:
        weights: One for all experts [experts, ...], or one for each.
        out_axis: The axis of an expert's matrix along which its outputs lie, 0 or 1.
        inner: Number of inputs; the largest one, where experts have fewer.
    """

    weights: tuple[Tensor, ...]
    out_axis: int
    inner: int

    def matrix(self, expert: int) -> Tensor:
        """The expert's own. [width, inner] or transposed, a view"""
        matrix = self.weights[0][expert] if self.weights[0].ndim == 3 else self.weights[expert]
        return matrix if self.out_axis == 0 else matrix.T


def inputs_of(model: nn.Module, block: Block, routed: Routed) -> tuple[Down, Tensor]:
    """The block's down-projections and what goes into them.

    Returns:
        The weights, and the inputs for each choice of each token. [tokens, k, inner]

    Raises:
        SettingError: The experts do not end in a linear step.
    """
    experts = model.get_submodule(block.experts)
    with torch.no_grad():
        return _of_fused(experts, block, routed) if block.fused else _of_list(experts, block, routed)


def _of_list(experts: nn.Module, block: Block, routed: Routed) -> tuple[Down, Tensor]:
    """The input of the linear layer whose output is the expert's."""
    weights: list[Tensor] = []
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for number, expert in enumerate(experts.children()):
        tokens, slots = torch.where((routed.index == number) & routed.valid)
        seen: list[tuple[nn.Linear, Tensor, Tensor]] = []

        def note(layer: nn.Module, args: tuple[Any, ...], output: Tensor, seen: Any = seen) -> None:
            seen.append((layer, args[0], output))

        linear = [m for m in expert.modules() if isinstance(m, nn.Linear)]
        handles = [m.register_forward_hook(note) for m in linear]
        try:
            # Without tokens one is run all the same, for its layer.
            output = expert(routed.hidden[tokens] if len(tokens) else routed.hidden[:1])
        finally:
            for handle in handles:
                handle.remove()
        last = [(layer, x) for layer, x, y in seen if y.shape == output.shape and torch.equal(y, output)]
        if not last:
            raise _refused(block)
        layer, x = last[-1]
        weights.append(layer.weight)
        parts.append((tokens, slots, x[: len(tokens)]))
    if not parts:
        raise _refused(block)
    inner = max(x.shape[-1] for *_, x in parts)
    found = parts[0][2].new_zeros(*routed.index.shape, inner)
    for tokens, slots, x in parts:
        found[tokens, slots, : x.shape[-1]] = x
    return Down(tuple(weights), 0, inner), found


def _of_fused(experts: nn.Module, block: Block, routed: Routed) -> tuple[Down, Tensor]:
    """Run the fused experts with matrices of zeros and ones in place of their own, which shows the inputs."""
    tokens, k = routed.index.shape
    index, weight = routed.index.reshape(-1, 1), torch.ones_like(routed.weight).reshape(-1, 1)
    hidden = routed.hidden.repeat_interleave(k, dim=0)

    def run(few: int | None = None) -> Tensor:
        out: Tensor = experts(hidden[:few], index[:few], weight[:few])
        return out

    own = list(experts.parameters(recurse=False))
    weights = next((p for p in reversed(own) if p.ndim == 3 and _linear(p, lambda: run(64))), None)
    if weights is None:
        raise _refused(block)
    width = routed.output.shape[-1]
    with ExitStack() as undo:
        for bias in _after(weights, own, lambda: run(64)):
            undo.enter_context(_holding(bias, torch.zeros_like(bias)))
        out_axis = _out_axis(weights, width, lambda: run(64))
        inner = weights.shape[2 - out_axis]
        parts = []
        for start in range(0, inner, width):
            chosen = torch.zeros_like(weights)
            view = chosen if out_axis == 0 else chosen.transpose(1, 2)  # [experts, width, inner]
            count = min(width, inner - start)
            view[:, torch.arange(count), torch.arange(start, start + count)] = 1
            with _holding(weights, chosen):
                parts.append(run()[:, :count])
    return Down((weights,), out_axis, inner), torch.cat(parts, dim=1).reshape(tokens, k, inner)


def _linear(weights: nn.Parameter, run: Callable[[], Tensor]) -> bool:
    """Whether the output follows a factor on these weights, a negative one too."""
    before = run()
    with _holding(weights, torch.zeros_like(weights)):
        without = run()
    with _holding(weights, -2 * weights.detach()):
        after = run()
    scale = float((before - without).abs().max())
    return scale > 0 and float((after - without + 2 * (before - without)).abs().max()) <= 1e-2 * scale


def _after(weights: nn.Parameter, own: list[nn.Parameter], run: Callable[[], Tensor]) -> list[nn.Parameter]:
    """The biases that are added behind these weights: they show where the weights are zero."""
    found = []
    with _holding(weights, torch.zeros_like(weights)):
        shown = run()
        for bias in (p for p in own if p.ndim == 2):
            with _holding(bias, torch.zeros_like(bias)):
                if not torch.equal(run(), shown):
                    found.append(bias)
    return found


def _out_axis(weights: nn.Parameter, width: int, run: Callable[[], Tensor]) -> int:
    first, second = weights.shape[1:]
    if first != second:
        return 0 if first == width else 1
    only = torch.zeros_like(weights)
    only[:, 0] = weights.detach()[:, 0]
    with _holding(weights, only):  # one output if these are outputs, all if they are inputs
        return 0 if int((run() != 0).any(0).sum()) <= 1 else 1


@contextmanager
def _holding(parameter: nn.Parameter, values: Tensor) -> Iterator[None]:
    before = parameter.data
    parameter.data = values
    try:
        yield
    finally:
        parameter.data = before


def _refused(block: Block) -> SettingError:
    return SettingError(
        f"experts {block.experts}: expected experts that end in a linear layer, got others. "
        "Leave this repair out."
    )
