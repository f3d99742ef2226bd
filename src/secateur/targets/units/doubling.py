"""Float64 everywhere: operators get float64 wherever a model's own code names a shorter dtype."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

_DOUBLE = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex64: torch.complex128,
}


def _grouped_product(
    rows: torch.Tensor, matrices: torch.Tensor, offs: torch.Tensor, *_: Any, **__: Any
) -> torch.Tensor:
    """Cut rows [rows, in] at the offsets, and multiply each part by its own of [matrices, in, out]."""
    ends = [0, *offs.tolist()]
    parts = [rows[a:b] @ matrix for a, b, matrix in zip(ends, ends[1:], matrices, strict=False)]
    return torch.cat([*parts, rows.new_zeros(len(rows) - ends[-1], matrices.shape[2])])


_WITHOUT_DOUBLE = {
    getattr(torch.ops.aten, name).default: function
    for name, function in {"_grouped_mm": _grouped_product}.items()
    if hasattr(torch.ops.aten, name)
}
"""Operators that have no kernel for float64, each with a function that computes the same."""


class Need(NamedTuple):
    """What an operator needs in a pass in float64 whose random numbers are shared.

    Attributes:
        double: Whether it may be given a dtype, or has no kernel for float64.
        random: Whether it draws random numbers.
    """

    double: bool
    random: bool


class Operators(dict[Any, Need | None]):
    """What each operator needs, looked up in its schema once for many passes; None if it needs nothing."""

    def __missing__(self, func: Any) -> Need | None:
        need = Need(
            double=func in _WITHOUT_DOUBLE or _takes_dtypes(func),
            random=torch.Tag.nondeterministic_seeded in getattr(func, "tags", ()),
        )
        self[func] = need if any(need) else None
        return self[func]


def names_shorter(args: Iterable[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether an operator is given a dtype that is shorter than float64."""
    return any(isinstance(value, torch.dtype) and value in _DOUBLE for value in (*args, *kwargs.values()))


def converted(func: Any, args: Any, kwargs: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """The function to call in place of an operator, with its arguments: float64 for each shorter dtype."""
    if isinstance(func, torch._ops.OpOverload):  # none takes a list of dtypes
        args = [_doubled(value) for value in args]
        kwargs = {name: _doubled(value) for name, value in kwargs.items()}
    else:
        args, kwargs = pytree.tree_map(_doubled, (args, kwargs))
    return _WITHOUT_DOUBLE.get(func, func), args, kwargs


def _doubled(value: Any) -> Any:
    return _DOUBLE.get(value, value) if isinstance(value, torch.dtype) else value


def _takes_dtypes(func: Any) -> bool:
    """Whether an operator may be given a dtype."""
    if not isinstance(func, torch._ops.OpOverload):
        return True
    return any("ScalarType" in str(argument.real_type) for argument in func._schema.arguments)


class _AllDouble(TorchDispatchMode):
    """Inside, every operator with a floating dtype as argument gets float64: models cast in their forward."""

    def __init__(self, operators: Operators) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._operators = operators

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._operators[func] is not None:
            func, args, kwargs = converted(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


_SHORTENING = {
    torch.Tensor.float: torch.Tensor.double,
    torch.Tensor.half: torch.Tensor.double,
    torch.Tensor.bfloat16: torch.Tensor.double,
    torch.Tensor.cfloat: torch.Tensor.cdouble,  # type: ignore[attr-defined]
    torch.Tensor.chalf: torch.Tensor.cdouble,  # type: ignore[attr-defined]
}
"""Methods of tensors that are named for a dtype."""


class _CallsInDouble(TorchFunctionMode):
    """Inside, calls of Python code get float64 for each shorter dtype that they name.

    This is far cheaper than `_AllDouble`, but misses casts outside of Python code, as in a scripted function.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func = _SHORTENING.get(func, func)
        if torch.dtype in map(type, args):
            args = [_doubled(value) for value in args]
        if not kwargs:
            return func(*args)
        return func(*args, **{name: _doubled(value) for name, value in kwargs.items()})


@contextmanager
def calls_in_double() -> Iterator[None]:
    """Inside, a model whose Python code casts to float32 or less gets float64. Nothing is compiled."""
    with double_by_default(), torch.compiler.set_stance("force_eager"), _CallsInDouble():
        yield


@contextmanager
def all_double(operators: Operators | None = None) -> Iterator[None]:
    """Inside, a model that casts to float32 or less gets float64; `operators` are those seen before."""
    with double_by_default(), _AllDouble(Operators() if operators is None else operators):
        yield


@contextmanager
def double_by_default() -> Iterator[None]:
    """Inside, tensors whose dtype nothing names have float64."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(default)
