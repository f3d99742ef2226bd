"""How far apart two models' outputs are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from secateur.graph.trace import evaluating


def run(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    """The floating-point outputs of a model in evaluation mode, flat."""
    with evaluating(model), torch.no_grad():
        output = model(*args, **kwargs)
    leaves = pytree.tree_leaves(output)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]


def relative_difference(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    """The largest over outputs of max|a - b| / max|b|; infinite if shapes or numbers of outputs differ.

    Positions that are not finite in both count as equal (masks filled with -inf), in one as infinite.
    """
    if len(ours) != len(theirs) or any(a.shape != b.shape for a, b in zip(ours, theirs, strict=True)):
        return float("inf")
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        finite = torch.isfinite(b)
        if not torch.equal(torch.isfinite(a), finite):
            return float("inf")
        a, b = a[finite].double(), b[finite].double()
        if b.numel():
            scale = float(b.abs().max())
            difference = float((a - b).abs().max())
            worst = max(worst, difference / scale if scale > 0 else difference)
    return worst
