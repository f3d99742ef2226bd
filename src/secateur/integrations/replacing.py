"""Replace the tensors and sizes of a model in place, so that references to the model stay valid."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from secateur.targets.units.module_form.mended import MendedMethod
from secateur.targets.units.module_form.sizes import set_sizes
from secateur.targets.units.record import record_of


def replace_parameters(model: nn.Module, small: nn.Module) -> None:
    """Give `model` the tensors, sizes and submodules of `small`, a pruned copy of it.

    A submodule stays the same object, with its hooks, if the class in `small` is the same or a subclass.
    Otherwise it is replaced by the submodule of `small`.

    Args:
        model: The model. It is changed in place.
        small: The result of `apply` or `repair` for a copy of `model`, in form ``module``. Do not use it
            afterwards: it shares tensors and submodules with `model`.
    """
    _replace(model, small)
    record = record_of(small)
    final = {
        path: record.sizes[path] if path.startswith("config.") else _value(small, path)
        for path in record.sizes
    }
    set_sizes(model, model, {k: list(v) if isinstance(v, tuple) else v for k, v in final.items()})


def _replace(old: nn.Module, new: nn.Module) -> None:
    old.__class__ = type(new)  # pruned attention may need a subclass that works with fewer heads
    for names, theirs in ((old._parameters, new._parameters), (old._buffers, new._buffers)):
        for name in [n for n in names if n not in theirs]:
            delattr(old, name)
        for name, tensor in theirs.items():
            # Use setattr, not the dictionary: recurrent layers update their list of flat weights in it.
            setattr(old, name, tensor)
    for name, value in vars(new).items():
        if name == "training":
            continue
        if isinstance(value, torch.Tensor) or (_is_plain(value) and vars(old).get(name) != value):
            setattr(old, name, value)
        elif isinstance(value, MendedMethod):
            setattr(old, name, value.moved(old))
    kept: dict[str, nn.Module | None] = {}
    for name, child in new._modules.items():
        mine = old._modules.get(name)
        if mine is None or child is None or not isinstance(child, type(mine)):
            kept[name] = child
        else:
            _replace(mine, child)
            kept[name] = mine
    old._modules.clear()
    old._modules.update(kept)


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return isinstance(value, bool | int | float | str)


def _value(root: Any, path: str) -> Any:
    for part in path.split("."):
        if isinstance(root, Mapping):
            root = root[part]
        else:
            root = root[int(part)] if isinstance(root, list | tuple) else getattr(root, part)
    return root
