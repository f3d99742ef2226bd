"""Functions with a backward pass of their own, which capture takes apart into operators."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from secateur.errors import ApplyError


@contextmanager
def own_backward(found: dict[str, str]) -> Iterator[None]:
    """Remember each `torch.autograd.Function` of the user that runs in the block: class -> source line.

    PyTorch's own, such as that of checkpointing, compute what their operators' gradients are.
    """
    original = torch.autograd.Function.__dict__["apply"]

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if not cls.__module__.startswith("torch."):
            frames = (f for f in reversed(traceback.extract_stack()[:-1]) if "/torch/" not in f.filename)
            frame = next(frames)
            file = frame.filename.replace("\\", "/").rsplit("/", 1)[-1]
            found.setdefault(cls.__qualname__, f"{file}:{frame.lineno}: {frame.line}")
        return original.__get__(None, cls)(*args, **kwargs)

    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.autograd.Function.apply = original  # type: ignore[method-assign]


class _NoGradient(torch.autograd.Function):
    """The identity; to differentiate it is refused."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, why: str) -> torch.Tensor:
        ctx.why = why
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> Any:
        raise ApplyError(ctx.why)


def without_gradient(value: Any, why: str) -> Any:
    """The same value; a backward pass through it raises an ApplyError that says why."""
    if isinstance(value, torch.Tensor) and value.requires_grad:
        return _NoGradient.apply(value, why)  # type: ignore[no-untyped-call]
    return value
