"""Form ``module``: the same classes with smaller tensors and updated attributes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from secateur.common.models import named_tensors
from secateur.plan import Plan
from secateur.targets.units.copying import duplicate
from secateur.targets.units.later_calls.callcheck import suspend
from secateur.targets.units.module_form.attention import follow_width, resize
from secateur.targets.units.module_form.attributes import new_attributes
from secateur.targets.units.module_form.sizes import Sizes, set_sizes
from secateur.targets.units.tensors import Removed, cut_like, kept, removed_positions, tensor_called


def smaller_module(model: nn.Module, plan: Plan, sizes: Sizes | None = None) -> nn.Module:
    """Copy a model with smaller tensors. They are cut during the copy, so there never is a dense copy.

    Args:
        model: The dense model.
        plan: The decision.
        sizes: New values of attributes with sizes, except those of PyTorch's own layers.

    Raises:
        ApplyError: The model cannot be copied, or has not all tensors of the plan.
    """
    removed = removed_positions(plan)
    cut_tensors = {name: tensor_called(model, name) for name in removed}
    # deepcopy takes the cut tensors from the memo wherever it meets the old ones. So tied weights stay tied.
    # The old tensors are kept alive here, since the memo knows them by id.
    with torch.inference_mode(False):
        memo: dict[int, object] = {id(t): cut_like(t, removed[name]) for name, t in cut_tensors.items()}
    small = duplicate(model, memo)
    suspend(small)
    by_identity = {id(cut_tensors[name]): axes for name, axes in removed.items()}
    for old, new in zip(model.modules(), small.modules(), strict=True):
        _update(old, new, by_identity)
    follow_width(small)
    set_sizes(model, small, sizes or {})
    _drop_emptied(small, removed)
    for module in small.modules():
        if isinstance(module, nn.RNNBase):  # cuDNN copies weights that are not in one piece at each call
            module.flatten_parameters()
    return small


def _drop_emptied(small: nn.Module, removed: Mapping[str, Removed]) -> None:
    """Remove modules from lists, in place, if all positions of their tensors were removed: whole experts."""
    for path, module in list(small.named_modules()):
        if isinstance(module, nn.ModuleList):
            # `children` would leave out None, and modules that the list holds twice.
            stay = [m for name, m in module._modules.items() if not _emptied(f"{path}.{name}", m, removed)]
            if len(stay) < len(module):
                module._modules = dict(zip(map(str, range(len(stay))), stay, strict=True))


def _emptied(path: str, module: nn.Module | None, removed: Mapping[str, Removed]) -> bool:
    """Whether a module has tensors, and all their positions were removed."""
    tensors = {} if module is None else named_tensors(module)
    return bool(tensors) and all(f"{path}.{k}" in removed and not t.numel() for k, t in tensors.items())


def _update(old: nn.Module, new: nn.Module, removed: dict[int, dict[int, NDArray[np.int64]]]) -> None:
    """Set the attributes of one copied module to the sizes of its tensors."""
    attention = isinstance(old, nn.MultiheadAttention)  # its output projection is a layer inside it
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
