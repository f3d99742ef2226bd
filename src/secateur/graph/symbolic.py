"""``len(tensor)`` and ``int(tensor)`` in a capture: symbols, where Python itself gives fixed numbers."""

from __future__ import annotations

import builtins
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from secateur.common.preserving import is_own


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


class _Meta(type):
    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        value = args[0] if len(args) == 1 else None
        if isinstance(value, torch.SymInt):
            return value
        if isinstance(value, torch.Tensor) and not value.dtype.is_floating_point:
            return value.item()
        return int(*args, **kwargs)

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, int)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, int)


class _Integer(int, metaclass=_Meta):
    """Stands for `int`."""


@contextmanager
def integers_open() -> Iterator[None]:
    """Inside, the user's code and that of libraries of models takes ``int(tensor)`` for ``tensor.item()``.

    Capture gives that a symbol, where Python's own `int` has to return a number: ``int(batch.max()) + 1``
    counts the graphs of a batch. Only where the first attempt failed, as ``type(x) is int`` is false inside.
    """
    modules = [m for name, m in list(sys.modules.items()) if is_own(name) and "int" not in vars(m)]
    try:
        for module in modules:
            vars(module)["int"] = _Integer
        yield
    finally:
        for module in modules:
            vars(module).pop("int", None)
