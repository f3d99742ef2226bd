"""Attributes of a model with sizes, by path, except those of PyTorch's own layers."""

from __future__ import annotations

import copy
from collections.abc import Mapping, MutableMapping
from typing import Any

from torch import fx, nn

from secateur.errors import ArtefactError
from secateur.targets.units.configuration import has_configuration, set_numbers

Sizes = Mapping[str, Any]
"""``module.path.attribute`` -> its new value: an integer, a list of integers, or a boolean."""


def running_modules(node: fx.Node) -> tuple[str, ...]:
    """Return the paths of the modules that were running when an operator was captured, outermost first."""
    return tuple(path for path, _ in (node.meta.get("nn_module_stack") or {}).values())


def set_sizes(dense: nn.Module, small: nn.Module, sizes: Sizes) -> None:
    """Set numbers of the smaller model, as far as they still have the dense model's values.

    Others have changed already, together with the tensors of their layer. A path consists of submodules,
    attributes, positions in lists and keys of mappings.
    """
    for key, value in sizes.items():
        path, _, name = key.rpartition(".")
        if key.startswith("config.") and has_configuration(small):
            set_numbers(small, {key.removeprefix("config."): value})
            continue
        old = _step(_reach(dense, path), name)
        if _step(_reach(small, path), name) != old or not _same_kind(old, value):
            continue
        new = type(old)(value) if isinstance(old, list | tuple) else value
        holder = _reach(small, path, own=True)
        if isinstance(holder, MutableMapping):
            holder[name] = new
        else:
            setattr(holder, name, new)


def _reach(root: nn.Module, path: str, *, own: bool = False) -> Any:
    """Return the object at a path.

    With `own`, a plain object of a submodule, such as a configuration, is copied first. Submodules share it,
    but may need different numbers.
    """
    holder: Any = root
    for part in path.split(".") if path else []:
        held = _step(holder, part)
        plain = not isinstance(held, nn.Module | Mapping | list | tuple)
        if own and plain and isinstance(holder, nn.Module) and holder is not root:
            held = copy.copy(held)
            setattr(holder, part, held)
        holder = held
    return holder


def _step(holder: Any, part: str) -> Any:
    if part.startswith("__"):
        raise ArtefactError(f"sizes: expected a path of submodules and attributes, got {part!r} in it.")
    if isinstance(holder, Mapping):
        return holder[part]
    if isinstance(holder, list | tuple):
        return holder[int(part)]
    return getattr(holder, part)


def _same_kind(old: Any, value: Any) -> bool:
    """Whether a value may replace another: a number or boolean of the same type, a list of equal length."""
    if isinstance(old, int):
        return type(old) is type(value)
    return isinstance(old, list | tuple) and isinstance(value, list) and len(old) == len(value)
