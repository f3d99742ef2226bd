"""Make ``len(tensor)`` and ``int(tensor)`` give symbols in a capture, where Python gives fixed numbers."""

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
    """Inside, ``len(tensor)`` is a symbol if the tensor's first size is one.

    Python's own `len` returns an integer, which would fix the size.
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
    """Replaces `int` in the user's modules."""


@contextmanager
def integers_open() -> Iterator[None]:
    """Inside, ``int(tensor)`` means ``tensor.item()`` in the user's code and in libraries of models.

    A capture gives a symbol for ``item``, where Python's own `int` has to return a number. An example is
    ``int(batch.max()) + 1``, which counts the graphs in a batch. Inside, ``type(x) is int`` is never true, so
    this is used only where a first attempt failed.
    """
    modules = [m for name, m in list(sys.modules.items()) if is_own(name) and "int" not in vars(m)]
    try:
        for module in modules:
            vars(module)["int"] = _Integer
        yield
    finally:
        for module in modules:
            vars(module).pop("int", None)
