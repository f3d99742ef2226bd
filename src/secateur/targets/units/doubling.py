"""Float64 everywhere: operators get it wherever a model's own code names a shorter dtype."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
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


class Doubling:
    """Converts the dtypes among the arguments of operators."""

    def __init__(self) -> None:
        self._take_dtypes: dict[Any, bool] = {}  # what schemas say; asked for again it would cost time

    def converted(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> tuple[Any, Any, Any]:
        """Return the function to call in place of an operator, with its arguments."""
        takes = self._take_dtypes.get(func)
        if takes is None:
            takes = self._take_dtypes[func] = _takes_dtypes(func)
        if takes:
            args, kwargs = pytree.tree_map(
                lambda value: _DOUBLE.get(value, value) if isinstance(value, torch.dtype) else value,
                (args, kwargs),
            )
        return _WITHOUT_DOUBLE.get(func, func), args, kwargs


def _takes_dtypes(func: Any) -> bool:
    """Whether an operator may be given a dtype. No operator takes a list of them."""
    if not isinstance(func, torch._ops.OpOverload):
        return True
    return any("ScalarType" in str(argument.real_type) for argument in func._schema.arguments)


class _AllDouble(TorchDispatchMode):
    """Inside, every operator with a floating dtype as argument gets float64: models cast in their forward."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._doubling = Doubling()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func, args, kwargs = self._doubling.converted(func, args, kwargs or {})
        return func(*args, **kwargs)


@contextmanager
def all_double() -> Iterator[None]:
    """Inside, a model that casts to float32 or less gets float64."""
    with double_by_default(), _AllDouble():
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
