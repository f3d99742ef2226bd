"""What a model returns, whatever it is: tensors in lists and dictionaries, in objects, in distributions."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

_PLAIN = (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool, int, float, str, type(None))


@dataclasses.dataclass(frozen=True, eq=False)
class _Object:
    """An object's attributes, or a mapping's entries, and what they make again.

    Attributes:
        cls: Its class.
        names: Of attributes or entries.
        rest: Attributes of a mapping.
        values: Of attributes or entries, as trees.
    """

    cls: Any
    names: tuple[Any, ...]
    rest: dict[str, Any]
    values: list[Any]

    def made(self) -> Any:
        """An object of the same class that holds the same."""
        made = self.cls.__new__(self.cls)
        held = dict(zip(self.names, self.values, strict=True))
        if isinstance(made, dict):
            dict.update(made, held)
            getattr(made, "__dict__", {}).update({k: held.get(k, v) for k, v in self.rest.items()})
        else:
            for name, value in held.items():
                object.__setattr__(made, name, value)
        return made


@dataclasses.dataclass(frozen=True, eq=False)
class _Constant:
    """What holds no tensor and passes through a capture as it is."""

    value: Any


pytree.register_pytree_node(
    _Object,
    lambda o: (o.values, (o.cls, o.names, o.rest)),
    lambda values, about: _Object(about[0], about[1], about[2], list(values)).made(),
)
pytree.register_pytree_node(_Constant, lambda o: ([], o.value), lambda _, value: value)


def opened(output: Any) -> Any:
    """The same with what PyTorch's trees do not know, as trees; unflattened it is what it was.

    Example:
        >>> from types import SimpleNamespace
        >>> leaves, spec = pytree.tree_flatten(opened([SimpleNamespace(a=torch.ones(1), b=torch.float32)]))
        >>> leaves
        [tensor([1.])]
        >>> pytree.tree_unflatten(["other"], spec)
        [namespace(a='other', b=torch.float32)]
    """
    return pytree.tree_map(lambda leaf: _opened(leaf, ()), output)


def tensors_of(output: Any) -> list[torch.Tensor]:
    """All tensors that a model returned, in order."""
    return [leaf for leaf in pytree.tree_leaves(opened(output)) if isinstance(leaf, torch.Tensor)]


def has_nan(outputs: list[torch.Tensor]) -> bool:
    """Whether one of a model's output tensors holds NaN."""
    return any(bool(torch.isnan(t).any()) for t in _numbers(outputs))


def is_finite_somewhere(outputs: list[torch.Tensor]) -> bool:
    """Whether a model's outputs hold at least one finite number: if not, there is nothing to compare."""
    numbers = _numbers(outputs)
    return not numbers or any(bool(torch.isfinite(t).any()) for t in numbers)


def _numbers(outputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Those of the tensors that hold floating or complex numbers, and of which there is something to see."""
    return [
        t
        for t in outputs
        if (t.is_floating_point() or t.is_complex())
        and t.layout is torch.strided
        and not (t.is_meta or t.is_nested)
        and t.numel()
    ]


def _opened(value: Any, inside: tuple[int, ...]) -> Any:
    if isinstance(value, _PLAIN):
        return value
    inside, again = (*inside, id(value)), id(value) in inside
    if isinstance(value, list | tuple) and not again:  # of a class of their own
        return [pytree.tree_map(lambda leaf: _opened(leaf, inside), part) for part in value]
    held = {} if again else _held(value)
    parts = [pytree.tree_map(lambda leaf: _opened(leaf, inside), part) for part in held.values()]
    if not any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(parts)):
        return _Constant(value)
    own = getattr(value, "__dict__", {}) if isinstance(value, dict) else {}
    rest = {name: None if name in held else v for name, v in own.items()}
    return _Object(type(value), tuple(held), rest, parts)


def _held(value: Any) -> dict[Any, Any]:
    """An object's attributes, or a mapping's entries."""
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
"""Relative difference of outputs that rounding may make; half precision is allowed fifty times that."""


def agree(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    """Whether two calls returned as many tensors, of the same shapes and types, with close numbers."""
    return len(ours) == len(theirs) and all(
        a.shape == b.shape and a.dtype == b.dtype and close(a, b) for a, b in zip(ours, theirs, strict=True)
    )


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two outputs of one shape differ by no more than rounding; NaN counts as zero."""
    allowed = CLOSE * (1 if a.dtype in (torch.float32, torch.float64) else 50)
    error = scale = 0.0
    # A piece at a time: the outputs of a language model may be the largest tensors that there are.
    for x, y in zip(*(_pieces(v) for v in (a, b)), strict=True):
        x, y = (torch.nan_to_num(v.double()) for v in (x, y))
        error += float((x - y).square().sum())
        scale += float(y.square().sum())
    return error <= allowed**2 * scale


def _pieces(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    strided = tensor.layout is torch.strided and not tensor.is_nested
    return tensor.reshape(-1).split(1 << 22) if strided else (tensor,)
