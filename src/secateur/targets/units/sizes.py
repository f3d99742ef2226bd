"""Attributes of a model by path: sizes that a smaller model holds, beyond those of PyTorch's own layers."""

from __future__ import annotations

import copy
from collections.abc import Mapping, MutableMapping
from typing import Any

from torch import fx, nn

from secateur.errors import ArtefactError
from secateur.targets.units.configuration import has_configuration, set_numbers

Sizes = Mapping[str, Any]
"""``module.path.attribute`` -> its new value: an integer, a list of them, or a boolean; see `set_sizes`."""


def running_modules(node: fx.Node) -> tuple[str, ...]:
    """Paths of the modules that were running when an operator was captured, outermost first."""
    return tuple(path for path, _ in (node.meta.get("nn_module_stack") or {}).values())


def set_sizes(dense: nn.Module, small: nn.Module, sizes: Sizes) -> None:
    """Set numbers of `small`, as far as they are still those of `dense`: a layer's own have followed.

    A path goes through submodules, attributes, list positions and mapping keys.
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
    """What a path leads to; with `own`, a plain object that a submodule holds is first made its alone.

    Submodules share a configuration, but may come to differ in what it says.
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
    """True for a number or boolean in place of one, or as many in place of a sequence: no more is held."""
    if isinstance(old, int):
        return type(old) is type(value)
    return isinstance(old, list | tuple) and isinstance(value, list) and len(old) == len(value)
