"""Form ``module``: the same classes with smaller tensors and updated attributes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from secateur.common.models import named_tensors
from secateur.plan import Plan
from secateur.targets.units.attention import follow_width, resize
from secateur.targets.units.attributes import new_attributes
from secateur.targets.units.copying import duplicate
from secateur.targets.units.sizes import Sizes, set_sizes
from secateur.targets.units.tensors import Removed, cut_like, kept, removed_positions, tensor_called


def smaller_module(model: nn.Module, plan: Plan, sizes: Sizes | None = None) -> nn.Module:
    """A copy of the model, smaller. Tensors are cut while copying, so no dense copy ever exists.

    Args:
        model: The dense model.
        plan: The decision.
        sizes: Attributes that hold sizes, beyond those of PyTorch's own layers, with their new values.

    Raises:
        ApplyError: If the model cannot be copied, or does not hold one of the plan's tensors.
    """
    removed = removed_positions(plan)
    cut_tensors = {name: tensor_called(model, name) for name in removed}
    # deepcopy takes what the memo already holds: the cut tensor, wherever the old one is referred to.
    # That keeps tied weights tied. The old tensors are held here, so their ids stay valid.
    with torch.inference_mode(False):
        memo: dict[int, object] = {id(t): cut_like(t, removed[name]) for name, t in cut_tensors.items()}
    small = duplicate(model, memo)
    by_identity = {id(cut_tensors[name]): axes for name, axes in removed.items()}
    for old, new in zip(model.modules(), small.modules(), strict=True):
        _update(old, new, by_identity)
    follow_width(small)
    set_sizes(model, small, sizes or {})
    _drop_emptied(small, removed)
    return small


def _drop_emptied(small: nn.Module, removed: Mapping[str, Removed]) -> None:
    """Take modules out of lists where the plan took all that their tensors hold: whole experts."""
    for path, module in list(small.named_modules()):
        if isinstance(module, nn.ModuleList):
            # Not its children: a list may hold a module twice, and None.
            stay = [m for name, m in module._modules.items() if not _emptied(f"{path}.{name}", m, removed)]
            if len(stay) < len(module):
                module._modules = dict(zip(map(str, range(len(stay))), stay, strict=True))


def _emptied(path: str, module: nn.Module | None, removed: Mapping[str, Removed]) -> bool:
    """Whether a module has tensors, and the plan took all that they hold."""
    tensors = {} if module is None else named_tensors(module)
    return bool(tensors) and all(f"{path}.{k}" in removed and not t.numel() for k, t in tensors.items())


def _update(old: nn.Module, new: nn.Module, removed: dict[int, dict[int, NDArray[np.int64]]]) -> None:
    attention = isinstance(old, nn.MultiheadAttention)  # whose output projection is a layer of its own
    own = [*old.parameters(recurse=attention), *old.buffers(recurse=False)]
    if not any(id(tensor) in removed for tensor in own):
        return

    def stays(name: str, axis: int) -> NDArray[np.bool_]:
        tensor = tensor_called(old, name)
        axes: Removed = removed.get(id(tensor), {})
        return kept(tensor.shape[axis], axes.get(axis, np.zeros(0, np.int64)))

    if isinstance(old, nn.MultiheadAttention) and isinstance(new, nn.MultiheadAttention):
        resize(old, new, stays)
    for attribute, value in new_attributes(old, stays).items():
        if getattr(new, attribute, value) != value:
            setattr(new, attribute, value)
