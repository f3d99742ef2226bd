"""``len(tensor)`` in a capture."""

from __future__ import annotations

import builtins
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def lengths_open() -> Iterator[None]:
    """Inside the block, ``len(tensor)`` is a symbol where the tensor's first size is one.

    Python's own returns an int, which fixes the size.
    """
    original = builtins.len

    def length(value: Any, /) -> Any:
        size = value.shape[0] if isinstance(value, torch.Tensor) and value.ndim else None
        return size if isinstance(size, torch.SymInt) else original(value)

    builtins.len = length
    try:
        yield
    finally:
        builtins.len = original
