"""A model whose tensors and sizes are replaced in place, so that whatever refers to it stays valid."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from secateur.apply.mended import MendedMethod
from secateur.apply.record import record_of
from secateur.apply.sizes import set_sizes


def replace_parameters(model: nn.Module, small: nn.Module) -> None:
    """Give `model` the tensors, sizes and submodules of `small`, which was made from it.

    Submodules of the same class, or of one made from it, stay the objects that they are, with their hooks and
    what else hangs on them; those that `small` has another class for are replaced.

    Args:
        model: Changed in place.
        small: What `apply` or `repair` made from a copy of it, in form ``module``; not to be used afterwards.
    """
    _replace(model, small)
    record = record_of(small)
    final = {
        path: record.sizes[path] if path.startswith("config.") else _value(small, path)
        for path in record.sizes
    }
    set_sizes(model, model, {k: list(v) if isinstance(v, tuple) else v for k, v in final.items()})


def _replace(old: nn.Module, new: nn.Module) -> None:
    old.__class__ = type(new)  # an attention that lost heads has a class that can do without them
    for names, theirs in ((old._parameters, new._parameters), (old._buffers, new._buffers)):
        for name in [n for n in names if n not in theirs]:
            delattr(old, name)
        for name, tensor in theirs.items():
            # Set, not put into the dictionary: a recurrent layer follows what is set.
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
