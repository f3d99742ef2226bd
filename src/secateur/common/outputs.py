"""The outputs of a model: find tensors in lists, dictionaries and objects of any class."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

_PLAIN = (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool, int, float, str, type(None))


@dataclasses.dataclass(frozen=True, eq=False)
class _Object:
    """An object or a mapping, taken apart so that PyTorch's trees can hold it.

    Attributes:
        cls: Its class.
        names: Names of the attributes or entries.
        rest: The attributes of a mapping.
        values: Values of the attributes or entries, as trees.
    """

    cls: Any
    names: tuple[Any, ...]
    rest: dict[str, Any]
    values: list[Any]

    def rebuilt(self) -> Any:
        """Return an object of the same class with the same values."""
        rebuilt = self.cls.__new__(self.cls)
        held = dict(zip(self.names, self.values, strict=True))
        if isinstance(rebuilt, dict):
            dict.update(rebuilt, held)
            getattr(rebuilt, "__dict__", {}).update({k: held.get(k, v) for k, v in self.rest.items()})
        else:
            for name, value in held.items():
                object.__setattr__(rebuilt, name, value)
        return rebuilt


@dataclasses.dataclass(frozen=True, eq=False)
class _Constant:
    """A value without tensors. A capture returns it unchanged."""

    value: Any


pytree.register_pytree_node(
    _Object,
    lambda o: (o.values, (o.cls, o.names, o.rest)),
    lambda values, about: _Object(about[0], about[1], about[2], list(values)).rebuilt(),
)
pytree.register_pytree_node(_Constant, lambda o: ([], o.value), lambda _, value: value)


def as_trees(output: Any) -> Any:
    """Replace objects that PyTorch's trees do not know by trees. Unflattening restores the objects.

    Example:
        >>> from types import SimpleNamespace
        >>> leaves, spec = pytree.tree_flatten(as_trees([SimpleNamespace(a=torch.ones(1), b=torch.float32)]))
        >>> leaves
        [tensor([1.])]
        >>> pytree.tree_unflatten(["other"], spec)
        [namespace(a='other', b=torch.float32)]
    """
    return pytree.tree_map(lambda leaf: _as_trees(leaf, ()), output)


def tensors_of(output: Any) -> list[torch.Tensor]:
    """Return all tensors in a model's output, in order."""
    return [leaf for leaf in pytree.tree_leaves(as_trees(output)) if isinstance(leaf, torch.Tensor)]


def has_nan(outputs: list[torch.Tensor]) -> bool:
    """Whether one of a model's output tensors holds NaN."""
    return any(bool(torch.isnan(t).any()) for t in _numbers(outputs))


def is_finite_somewhere(outputs: list[torch.Tensor]) -> bool:
    """Whether a model's outputs hold at least one finite number: if not, there is nothing to compare."""
    numbers = _numbers(outputs)
    return not numbers or any(bool(torch.isfinite(t).any()) for t in numbers)


def _numbers(outputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return the tensors of floating or complex numbers that are not empty and can be read."""
    return [
        t
        for t in outputs
        if (t.is_floating_point() or t.is_complex())
        and t.layout is torch.strided
        and not (t.is_meta or t.is_nested)
        and t.numel()
    ]


def _as_trees(value: Any, inside: tuple[int, ...]) -> Any:
    if isinstance(value, _PLAIN):
        return value
    inside, again = (*inside, id(value)), id(value) in inside
    if isinstance(value, list | tuple) and not again:  # of a class that PyTorch's trees do not know
        return [pytree.tree_map(lambda leaf: _as_trees(leaf, inside), part) for part in value]
    held = {} if again else _held(value)
    parts = [pytree.tree_map(lambda leaf: _as_trees(leaf, inside), part) for part in held.values()]
    if not any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(parts)):
        return _Constant(value)
    own = getattr(value, "__dict__", {}) if isinstance(value, dict) else {}
    rest = {name: None if name in held else v for name, v in own.items()}
    return _Object(type(value), tuple(held), rest, parts)


def _held(value: Any) -> dict[Any, Any]:
    """Return an object's attributes, or a mapping's entries."""
    if isinstance(value, nn.Module | type):
        return {}
    if isinstance(value, dict):
        return dict(value)
    held = dict(getattr(value, "__dict__", {}))
    if dataclasses.is_dataclass(value):  # which may have slots
        names = [field.name for field in dataclasses.fields(value)]
        held = {name: getattr(value, name) for name in names if hasattr(value, name)} | held
    return held


CLOSE = 1e-3
"""Largest relative difference that counts as rounding; in half precision, fifty times as much."""


def agree(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    """Whether two calls returned equally many tensors, with the same shapes and types and close values."""
    return len(ours) == len(theirs) and all(
        a.shape == b.shape and a.dtype == b.dtype and close(a, b) for a, b in zip(ours, theirs, strict=True)
    )


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two outputs of one shape differ by no more than rounding; NaN counts as zero."""
    allowed = CLOSE * (1 if a.dtype in (torch.float32, torch.float64) else 50)
    error = scale = 0.0
    # Piece by piece: the outputs of a language model may be its largest tensors.
    for x, y in zip(*(_pieces(v) for v in (a, b)), strict=True):
        x, y = (torch.nan_to_num(v.double()) for v in (x, y))
        error += float((x - y).square().sum())
        scale += float(y.square().sum())
    return error <= allowed**2 * scale


def _pieces(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    strided = tensor.layout is torch.strided and not tensor.is_nested
    return tensor.reshape(-1).split(1 << 22) if strided else (tensor,)
