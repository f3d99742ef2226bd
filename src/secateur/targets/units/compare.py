"""How far apart two models' outputs are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from secateur.common.models import evaluating
from secateur.common.outputs import tensors_of
from secateur.common.preserving import State
from secateur.targets.units.copying import duplicate
from secateur.targets.units.draws import Draws

M = TypeVar("M", bound=nn.Module)

SAME = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 5e-2}
"""Relative difference below which two forms count as equal; they may sum in another order."""


class Way(NamedTuple):
    """How a model is run: in which mode, and by which method if not by calling it.

    Gradients are on in training mode; in evaluation mode only if `gradients` says so.
    """

    training: bool = False
    method: str = ""
    gradients: bool = False

    def __str__(self) -> str:
        """Words behind the sizes; none for a plain run."""
        called = f" of method {self.method}" if self.method else ""
        return f"{called} in training mode" if self.training else called


PLAIN = Way()

Runs = Callable[[tuple[Any, ...], Mapping[str, Any], Draws], list[torch.Tensor]]
"""Runs a model on arguments."""


def run(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    draws: Draws | None = None,
    way: Way = PLAIN,
    state: State | None = None,
) -> list[torch.Tensor]:
    """The output tensors of a model, flat.

    Args:
        model: Any module; it is left as it was.
        args: Positional arguments.
        kwargs: Keyword arguments.
        draws: The random numbers, for what is compared with another run.
        way: In which mode, by which method, and whether with gradients.
        state: The model's state, if it is known already.
    """
    shared = draws.shared() if draws is not None else nullcontext()
    with (
        evaluating(model, training=way.training, state=state),
        torch.set_grad_enabled(way.training or way.gradients),
        shared,
    ):
        output = getattr(model, way.method or "__call__")(*args, **kwargs)
    return [tensor.detach() for tensor in tensors_of(output)]


def run_both(
    ours: Runs,
    theirs: Runs,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    draws: Draws,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The output tensors of two models that draw the same random numbers.

    Args:
        ours: Runs one model.
        theirs: Runs the other.
        args: Positional arguments.
        kwargs: Keyword arguments.
        draws: The numbers, to look at afterwards or to use again.
    """
    got, wanted = (runs(args, kwargs, draws) for runs in (ours, theirs))
    if draws.narrowed:
        got = ours(args, kwargs, draws)
    return got, wanted


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


_DOUBLE = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex64: torch.complex128,
}


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
        kwargs = kwargs or {}
        if not isinstance(func, torch._ops.OpOverload) or _names_dtype(args, kwargs):
            args, kwargs = pytree.tree_map(
                lambda value: _DOUBLE.get(value, value) if isinstance(value, torch.dtype) else value,
                (args, kwargs),
            )
        return _WITHOUT_DOUBLE.get(func, func)(*args, **kwargs)


def _names_dtype(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether an operator gets a dtype; none takes a list of them."""
    return any(isinstance(v, torch.dtype) for v in args) or any(
        isinstance(v, torch.dtype) for v in kwargs.values()
    )


@contextmanager
def all_double() -> Iterator[None]:
    """Inside, whatever a model casts to float32 or less is float64."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _AllDouble():  # type: ignore[no-untyped-call]
            yield
    finally:
        torch.set_default_dtype(default)


def run_in_double(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    draws: Draws | None = None,
    way: Way = PLAIN,
) -> list[torch.Tensor]:
    """`run` on a float64 copy of the model and of the inputs, whatever casts the model makes."""
    return run_doubled(double_copy(model), args, kwargs, draws, way)


def run_doubled(
    double: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    draws: Draws | None = None,
    way: Way = PLAIN,
    state: State | None = None,
) -> list[torch.Tensor]:
    """`run_in_double` for a model that is a float64 copy already."""
    args, kwargs = doubled(args, kwargs)
    with all_double():
        return run(double, args, kwargs, draws, way, state)


class Double:
    """A float64 copy of a model, for many passes. Each starts from the state in which it was made.

    Attributes:
        model: The copy.
        state: Its state, which is put back after each pass. What `State` does not see is left as
            the pass left it, for example a random generator of Python's.
    """

    def __init__(self, model: nn.Module, *, own: bool = False) -> None:
        """Make the copy; `own`: the model is a copy that nothing else needs, which is changed instead."""
        self.model = in_double(model) if own else double_copy(model)
        self.state = State(self.model)

    def run(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], draws: Draws | None = None, way: Way = PLAIN
    ) -> list[torch.Tensor]:
        """`run_in_double` of the model."""
        return run_doubled(self.model, args, kwargs, draws, way, self.state)


def doubled(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with floats in float64, and complex numbers of two of these."""
    found: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map_only(
        torch.Tensor, lambda t: _double(t.detach()), (args, dict(kwargs))
    )
    return found


def double_copy(model: M) -> M:
    """A copy whose parameters, buffers and tensor attributes hold float64."""
    return in_double(duplicate(model))


def in_double(model: M) -> M:
    """The model itself, once its parameters, buffers and tensor attributes hold float64."""
    double = model.double()
    for module in double.modules():
        for held in (module._parameters, module._buffers):
            for tensor in held.values():
                if tensor is not None and tensor.is_complex():
                    tensor.data = _double(tensor.data)
        for name, value in list(vars(module).items()):
            if isinstance(value, torch.Tensor):
                vars(module)[name] = _double(value)
    return double


def _double(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_complex():
        return tensor.to(torch.complex128)
    return tensor.double() if tensor.is_floating_point() else tensor
