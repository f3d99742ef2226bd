"""Attributes of a model with sizes, by path, except those of PyTorch's own layers."""

from __future__ import annotations

import copy
from collections.abc import Mapping, MutableMapping
from typing import Any

from torch import fx, nn

from secateur.errors import ArtefactError
from secateur.targets.units.module_form.configuration import has_configuration, set_numbers

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
        if not _in_configuration(small, key):
            old = _step(_object_at(dense, key.rpartition(".")[0]), key.rpartition(".")[2])
            now = _step(_object_at(small, key.rpartition(".")[0]), key.rpartition(".")[2])
            if now != old or not _same_kind(old, value):
                continue
        put(small, key, value)


def put(model: nn.Module, key: str, value: Any) -> None:
    """Set the number, boolean or list at a path of a model, or of its configuration.

    Raises:
        ArtefactError: There is no such number or list at the path.
    """
    if _in_configuration(model, key):
        set_numbers(model, {key.removeprefix("config."): value})
        return
    path, _, name = key.rpartition(".")
    old = _step(_object_at(model, path), name)
    if not isinstance(old, int | list | tuple) or isinstance(old, list | tuple) != isinstance(value, list):
        raise ArtefactError(f"sizes: expected {key} to be a number or a list, got {type(old).__name__}.")
    new = type(old)(value) if isinstance(old, list | tuple) else value
    owner = _object_at(model, path, own=True)
    if isinstance(owner, MutableMapping):
        owner[name] = new
    else:
        setattr(owner, name, new)


def _in_configuration(model: nn.Module, key: str) -> bool:
    return key.startswith("config.") and has_configuration(model)


def _object_at(root: nn.Module, path: str, *, own: bool = False) -> Any:
    """Return the object at a path.

    With `own`, a plain object of a submodule, such as a configuration, is copied first. Submodules share it,
    but may need different numbers.
    """
    owner: Any = root
    for part in path.split(".") if path else []:
        inner = _step(owner, part)
        plain = not isinstance(inner, nn.Module | Mapping | list | tuple)
        if own and plain and isinstance(owner, nn.Module) and owner is not root:
            inner = copy.copy(inner)
            setattr(owner, part, inner)
        owner = inner
    return owner


def _step(owner: Any, part: str) -> Any:
    if part.startswith("__"):
        raise ArtefactError(f"sizes: expected a path of submodules and attributes, got {part!r} in it.")
    try:
        if isinstance(owner, Mapping):
            return owner[part]
        return owner[int(part)] if isinstance(owner, list | tuple) else getattr(owner, part)
    except (AttributeError, LookupError, ValueError) as error:
        raise ArtefactError(
            f"sizes: expected a path of submodules and attributes of the model, got one with {part[:60]!r}, "
            f"which its {type(owner).__name__} does not have."
        ) from error


def _same_kind(old: Any, value: Any) -> bool:
    """Whether a value may replace another: a number or boolean of the same type, a list of equal length."""
    if isinstance(old, int):
        return type(old) is type(value)
    return isinstance(old, list | tuple) and isinstance(value, list) and len(old) == len(value)
