"""FLAP as its paper has it, for a Llama: its rule, and its bias compensation.

The rule is `secateur.Global` with the signal ``fluctuation``. The compensation adds a bias to the layers that
read what was removed. The layers of a Llama have none, so the repair ``bias`` has nothing to shift there.

Source: An et al. 2023, Fluctuation-based Adaptive Structured Pruning, arXiv 2312.11983. Written from the
paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import secateur as sc


@torch.no_grad()
def mean_inputs(dense: nn.Module, graph: sc.Graph, data: Sequence[Tensor]) -> dict[str, Tensor]:
    """The mean over samples and positions of what each linear layer reads that reads a group.

    Args:
        dense: The dense model.
        graph: Its trace.
        data: Batches of inputs, all of one size.

    Returns:
        Name of the layer -> means of its inputs, float64 [inputs].
    """
    readers = {p.tensor.removesuffix(".weight") for g in graph.groups for p in g.of_role("consume")}
    mean: dict[str, Any] = dict.fromkeys(readers, 0.0)

    def add(name: str, x: Tensor) -> None:
        mean[name] = mean[name] + x.flatten(0, -2).double().mean(0) / len(data)

    hooks = [
        dense.get_submodule(name).register_forward_pre_hook(lambda _, given, name=name: add(name, given[0]))
        for name in readers
    ]
    for batch in data:
        dense(batch)
    for hook in hooks:
        hook.remove()
    return mean


@torch.no_grad()
def compensated(
    small: nn.Module, dense: nn.Module, graph: sc.Graph, plan: sc.Plan, mean: dict[str, Tensor]
) -> nn.Module:
    """Add to each linear layer the mean output of the inputs that it lost, in place.

    Args:
        small: The pruned module.
        dense: The dense model.
        graph: Its trace.
        plan: What was removed.
        mean: From `mean_inputs`: the baseline.

    Returns:
        `small`.
    """
    removed = {group.name: group.removed for group in plan.groups}
    gone: dict[str, dict[str, set[int]]] = {"produce": {}, "consume": {}}
    for group in graph.groups:
        for role, found in gone.items():
            for piece in group.of_role(role):
                lost = piece.position[np.isin(piece.unit, removed[group.name])]
                found.setdefault(piece.tensor.removesuffix(".weight"), set()).update(lost.tolist())
    for name, positions in gone["consume"].items():
        if not positions:
            continue
        at = sorted(positions)
        weight = dense.get_submodule(name).weight
        lost_outputs = gone["produce"].get(name, set())
        kept = [k for k in range(len(weight)) if k not in lost_outputs]
        bias = (weight[kept][:, at].double() @ mean[name][at]).to(weight.dtype)
        layer = small.get_submodule(name)
        layer.bias = nn.Parameter(bias if layer.bias is None else layer.bias + bias)
    return small
