"""Copies of models."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import nn

from secateur.errors import ApplyError

M = TypeVar("M", bound=nn.Module)


def duplicate(model: M, memo: dict[int, object] | None = None) -> M:
    """A deep copy; what `memo` holds stands in for what has that id.

    Raises:
        ApplyError: If the model cannot be copied.
    """
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise ApplyError(
            f"apply: expected {type(model).__name__} to be copyable, got {type(error).__name__}: {error} "
            f"Remove attributes that copy.deepcopy refuses (locks, generators, tensors with history)."
        ) from error
