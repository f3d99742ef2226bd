"""FLAP as its paper has it, for a Llama: its rule, and its bias compensation.

The rule is `secateur.Global` with the signal ``fluctuation``. The compensation adds a bias to the layers that
read what was removed. The layers of a Llama have none, so the repair ``bias`` has nothing to shift there.

Source: An et al. 2023, Fluctuation-based Adaptive Structured Pruning, arXiv 2312.11983. Written from the
paper.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

import secateur as sc


@torch.no_grad()
def compensated(
    small: nn.Module, dense: nn.Module, graph: sc.Graph, plan: sc.Plan, data: Sequence[Tensor]
) -> nn.Module:
    """Add to each linear layer the mean output of the inputs that it lost, in place.

    Args:
        small: The pruned module.
        dense: The dense model, whose mean inputs on the data are the baseline.
        graph: Its trace.
        plan: What was removed.
        data: Batches of inputs.

    Returns:
        `small`.
    """
    kept = {group.name: np.setdiff1d(np.arange(group.size), group.removed) for group in plan.groups}
    gone: dict[str, set[int]] = {}
    for group in graph.groups:
        for piece in group.of_role("consume"):
            lost = piece.position[~np.isin(piece.unit, kept[group.name])]
            gone.setdefault(piece.tensor.removesuffix(".weight"), set()).update(lost.tolist())
    gone = {name: positions for name, positions in gone.items() if positions}
    mean = {name: 0.0 for name in gone}

    def add(name: str, x: Tensor) -> None:
        mean[name] = mean[name] + x.flatten(0, -2).double().mean(0) / len(data)

    hooks = [
        dense.get_submodule(name).register_forward_pre_hook(lambda _, given, name=name: add(name, given[0]))
        for name in gone
    ]
    for batch in data:
        dense(batch)
    for hook in hooks:
        hook.remove()
    for name, positions in gone.items():
        at = torch.tensor(sorted(positions))
        weight = dense.get_submodule(name).weight
        bias = (weight[:, at].double() @ mean[name][at]).to(weight.dtype)
        layer = small.get_submodule(name)
        layer.bias = nn.Parameter(bias if layer.bias is None else layer.bias + bias)
    return small
