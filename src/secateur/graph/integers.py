"""``int(tensor)`` in a capture."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from secateur.preserving import is_own


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
