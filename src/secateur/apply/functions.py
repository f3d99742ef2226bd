"""Values through which a captured program must not differentiate."""

from __future__ import annotations

from typing import Any

import torch

from secateur.errors import ApplyError


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
