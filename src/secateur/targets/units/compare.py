"""Running two models on the same inputs and random numbers, and comparing their outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn
from torch.utils import _pytree as pytree

from secateur.common.caches import change_kept
from secateur.common.mapped import is_mapped, stored_like
from secateur.common.models import evaluating
from secateur.common.outputs import tensors_of
from secateur.common.preserving import State
from secateur.errors import VerificationError
from secateur.graph.answering import answering
from secateur.targets.units.copying import duplicate
from secateur.targets.units.doubling import all_double
from secateur.targets.units.draws import AnyDraws

M = TypeVar("M", bound=nn.Module)

SAME = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 5e-2}
"""The relative difference up to which two forms count as equal. They may add numbers in another order."""

ROUNDED = max(SAME.values())
"""The largest relative difference that a cast to a shorter dtype in the forward pass can make."""


class Way(NamedTuple):
    """How to run a model.

    Attributes:
        training: Whether in training mode, with gradients.
        method: The method to call; empty for ``forward``.
        gradients: Whether gradients are on in evaluation mode too.
        answer: The outcome of all conditions on values of tensors; None: what the values say.
        calls: How often it is called in a row; the outputs are those of the last call.
    """

    training: bool = False
    method: str = ""
    gradients: bool = False
    answer: bool | None = None
    calls: int = 1

    def __str__(self) -> str:
        """Say how the model runs, in words that follow the sizes in a message; empty for a plain run."""
        words = f" of method {self.method}" if self.method else ""
        words += " in training mode" if self.training else ""
        words += f" after {self.calls - 1} other calls" if self.calls > 1 else ""
        answered = f" where all conditions on values of tensors are {self.answer}"
        return words if self.answer is None else words + answered


PLAIN = Way()

Runs = Callable[[tuple[Any, ...], Mapping[str, Any], AnyDraws], list[torch.Tensor]]
"""A function that runs a model on arguments and returns its output tensors."""


def run(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    draws: AnyDraws | None = None,
    way: Way = PLAIN,
    state: State | None = None,
    buffers: dict[str, torch.Tensor] | None = None,
    *,
    double: bool = False,
) -> list[torch.Tensor]:
    """Run a model and return its output tensors, flattened.

    Args:
        model: Any module; it is left as it was.
        args: Positional arguments.
        kwargs: Keyword arguments.
        draws: The random numbers to use, if the outputs are compared with another run.
        way: How to run the model.
        state: The model's state, if the caller has it already.
        buffers: A dictionary that gets the buffers' values after the pass. The model's own are restored.
        double: Whether operators get float64 wherever the model names a shorter dtype.
    """
    not_shared = all_double() if double else nullcontext()
    with (
        evaluating(model, training=way.training, state=state),
        torch.set_grad_enabled(way.training or way.gradients),
        answering(way.answer),
        not_shared if draws is None else draws.shared(double=double),
    ):
        for _ in range(way.calls):
            output = getattr(model, way.method or "__call__")(*args, **kwargs)
        if buffers is not None:
            buffers.update((name, buffer.detach().clone()) for name, buffer in model.named_buffers())
    return [tensor.detach() for tensor in tensors_of(output)]


def run_both(
    first: Runs,
    second: Runs,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    draws: AnyDraws,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Run two models with the same random numbers and return the output tensors of both.

    Args:
        first: Runs one model.
        second: Runs the other.
        args: Positional arguments.
        kwargs: Keyword arguments.
        draws: The random numbers to use.
    """
    got, wanted = (runs(args, kwargs, draws) for runs in (first, second))
    if draws.narrowed:
        got = first(args, kwargs, draws)
    return got, wanted


_FILLED = 1e4
"""Numbers from here on may be masks, such as -1e9."""


def rounding_of(outputs: list[torch.Tensor]) -> float:
    """The relative difference that rounding may make between equal outputs of these dtypes; 0 for none."""
    return max((SAME.get(tensor.dtype, 1e-3) for tensor in outputs), default=0.0)


def largest(tensor: torch.Tensor) -> float:
    """The largest absolute value in a tensor with entries; NaN if one of them is."""
    tensor = tensor.detach()
    if tensor.is_complex():
        return float(tensor.abs().max())
    low, high = map(float, tensor.aminmax())
    return max(-low, high)


def relative_difference(outputs: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Compute the largest max|a - b| / max|b| over all outputs; infinite if their number or shapes differ.

    `a` is one of `outputs` and `b` the expected one. Positions that are not finite in both, such as masks
    filled with -inf, count as equal. Where only one is not finite, the result is infinite. Equal numbers from
    10,000 on are left out, since they are masks as well, such as -1e9: a scale of that size would make any
    other difference look small.
    """
    if [tensor.shape for tensor in outputs] != [tensor.shape for tensor in expected]:
        return float("inf")
    worst = 0.0
    for a, b in zip(outputs, expected, strict=True):
        if a.is_complex() != b.is_complex():
            return float("inf")
        if a.is_complex():
            a, b = torch.view_as_real(a.resolve_conj()), torch.view_as_real(b.resolve_conj())
        a, b = a.double(), b.double()
        if b.numel() and not largest(b) < _FILLED:  # rarely: some are masks, or not finite
            finite = torch.isfinite(b)
            if not torch.equal(torch.isfinite(a), finite):
                return float("inf")
            counts = finite & ~((a == b) & (b.abs() >= _FILLED))
            a, b = a[counts], b[counts]
        if b.numel():
            scale, difference = largest(b), largest(a - b)
            if not math.isfinite(difference):
                return float("inf")
            worst = max(worst, difference / scale if scale > 0 else difference)
    return worst


def run_in_double(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    draws: AnyDraws | None = None,
    way: Way = PLAIN,
    buffers: dict[str, torch.Tensor] | None = None,
) -> list[torch.Tensor]:
    """Run a float64 copy of a model on float64 inputs, also where the model casts; see `run`."""
    return run_doubled(double_copy(model), args, kwargs, draws, way, buffers=buffers)


def run_doubled(
    double: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    draws: AnyDraws | None = None,
    way: Way = PLAIN,
    state: State | None = None,
    buffers: dict[str, torch.Tensor] | None = None,
) -> list[torch.Tensor]:
    """Run a model that is a float64 copy already on float64 inputs; see `run`."""
    args, kwargs = doubled(args, kwargs)
    return run(double, args, kwargs, draws, way, state, buffers, double=True)


class Double:
    """A float64 copy of a model, for many passes. Each starts from the state in which it was made.

    Attributes:
        model: The copy.
        state: The state of the copy, which is restored after each pass. What `State` does not cover, such as
            a random generator of Python's, is not restored.
    """

    def __init__(self, model: nn.Module, *, own: bool = False) -> None:
        """Make the copy. With `own`, convert the model itself instead, since nothing else needs it."""
        self.model = in_double(model) if own else double_copy(model)
        self.state = State(self.model)

    def run(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        draws: AnyDraws | None = None,
        way: Way = PLAIN,
        buffers: dict[str, torch.Tensor] | None = None,
    ) -> list[torch.Tensor]:
        """Run the copy on float64 inputs; see `run`."""
        return run_doubled(self.model, args, kwargs, draws, way, self.state, buffers)


def doubled(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Convert floats in arguments to float64, and complex numbers to complex128."""
    found: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map_only(
        torch.Tensor, lambda t: _double(t.detach()), (args, dict(kwargs))
    )
    return found


def double_copy(model: M) -> M:
    """Copy a model, with parameters, buffers and tensor attributes in float64.

    Hooks that only watch what a user sets later do nothing in the copy; see
    `secateur.targets.units.later_calls.callcheck`.
    """
    hooks = (hook for module in model.modules() for hook in module._forward_pre_hooks.values())
    return in_double(duplicate(model, {id(h): _idle for h in hooks if getattr(h, "only_watches", False)}))


def _idle(*_: Any) -> None:
    """Do nothing."""


def in_double(model: M) -> M:
    """Convert parameters, buffers and other tensors that a model keeps to float64, in place; return it."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for tensor in tensors.values():
                if tensor is not None and (tensor.is_complex() or is_mapped(tensor)):
                    tensor.data = _double(tensor.data)
    double = model.double()
    for module in double.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, torch.Tensor):
                vars(module)[name] = _double(value)
    change_kept(double, _double)
    return double


def _double(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_complex():
        return tensor.to(torch.complex128)
    return stored_like(tensor.double(), tensor) if tensor.is_floating_point() else tensor


def require_same(expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor], what: str) -> None:
    """Compare tensors bit for bit, by name.

    Args:
        expected: The tensors of the reference model.
        found: The tensors of the pruned model.
        what: The reference model, in words for the message.

    Raises:
        VerificationError: A tensor differs, or only one of the models has it.
    """
    for name in (*expected, *(name for name in found if name not in expected)):
        wanted, got = expected.get(name), found.get(name)
        if wanted is not None and got is not None and wanted.shape == got.shape:
            wanted = wanted.to(got.device)
            if bool(((wanted == got) | ((wanted != wanted) & (got != got))).all()):  # NaN counts as equal
                continue
        raise VerificationError(
            f"verify: expected the tensors of the {what}, got others for {name}. Repair and training change "
            "them: verify what apply returned."
        )
