"""How far apart two models' outputs are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from secateur.apply.copying import duplicate
from secateur.models import evaluating


def run(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    """The output tensors of a model in evaluation mode, flat."""
    with evaluating(model), torch.no_grad():
        output = model(*args, **kwargs)
    leaves = pytree.tree_leaves(output)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def relative_difference(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    """The largest over outputs of max|a - b| / max|b|; infinite if shapes or numbers of outputs differ.

    Positions that are not finite in both count as equal (masks filled with -inf), in one as infinite.
    """
    if len(ours) != len(theirs) or any(a.shape != b.shape for a, b in zip(ours, theirs, strict=True)):
        return float("inf")
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        if a.is_complex() != b.is_complex():
            return float("inf")
        if a.is_complex():
            a, b = torch.view_as_real(a.resolve_conj()), torch.view_as_real(b.resolve_conj())
        finite = torch.isfinite(b)
        if not torch.equal(torch.isfinite(a), finite):
            return float("inf")
        a, b = a[finite].double(), b[finite].double()
        if b.numel():
            scale = float(b.abs().max())
            difference = float((a - b).abs().max())
            worst = max(worst, difference / scale if scale > 0 else difference)
    return worst


_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def _grouped_product(
    rows: torch.Tensor, matrices: torch.Tensor, offs: torch.Tensor, *_: Any, **__: Any
) -> torch.Tensor:
    """Rows [rows, in] up to each offset, times one of the matrices [matrices, in, out] after the other."""
    ends = [0, *offs.tolist()]
    parts = [rows[a:b] @ matrix for a, b, matrix in zip(ends, ends[1:], matrices, strict=False)]
    return torch.cat([*parts, rows.new_zeros(len(rows) - ends[-1], matrices.shape[2])])


_WITHOUT_DOUBLE = {
    getattr(torch.ops.aten, name).default: function
    for name, function in {"_grouped_mm": _grouped_product}.items()
    if hasattr(torch.ops.aten, name)
}
"""Operators whose kernels know no float64, with what computes the same."""


class _AllDouble(TorchDispatchMode):
    """Every operator that names a floating dtype gets float64: models cast inside their forward pass."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = pytree.tree_map(
            lambda value: torch.float64 if isinstance(value, torch.dtype) and value in _FLOATS else value,
            (args, kwargs or {}),
        )
        return _WITHOUT_DOUBLE.get(func, func)(*args, **kwargs)


@contextmanager
def _all_double() -> Iterator[None]:
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _AllDouble():  # type: ignore[no-untyped-call]
            yield
    finally:
        torch.set_default_dtype(default)


def run_in_double(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    """`run` on a float64 copy of the model and of the inputs, whatever casts the model makes."""
    return run_doubled(duplicate(model).double(), args, kwargs)


def run_doubled(double: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    """`run_in_double` for a model that is a float64 copy already."""
    args, kwargs = pytree.tree_map(
        lambda v: v.detach().double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v,
        (args, dict(kwargs)),
    )
    with _all_double():
        return run(double, args, kwargs)
