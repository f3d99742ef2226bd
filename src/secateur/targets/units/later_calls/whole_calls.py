"""Functions of PyTorch that count as one operator, and the sizes that code reads; see `Operators`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from secateur.graph.courses import leaves
from secateur.graph.watchednumbers import Watched, plain
from secateur.targets.units.later_calls.operators import SAFE, WHOLE_CALLS, Operators


class WholeCalls(TorchFunctionMode):
    """Inside, some functions count as one operator, and sizes at which units may be missing are watched.

    Attention runs without dropout, which draws for each head and position by itself.
    """

    def __init__(self, operators: Operators) -> None:
        super().__init__()
        self._operators = operators

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function."""
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name in ("__get__", "size", "numel"):
            return self._read(func, args, kwargs)
        if name == "__set__" and isinstance(args[1], Tensor):
            self._operators.replaced(*args)
        operators, given = self._operators, leaves((args, kwargs))
        before = operators.is_sized, operators.explained
        numbers = [*_watched(given)]
        operators.is_sized |= any(number.course is operators for number in numbers)
        operators.explained |= {plain(number) for number in numbers if number.course is SAFE}
        try:
            if func is scaled_dot_product_attention:
                args = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
                kwargs = {**kwargs, "dropout_p": 0.0} if "dropout_p" in kwargs else kwargs
                return self._operators.attention(*args, **kwargs)
            if name in WHOLE_CALLS:
                return self._operators.as_one(func, args, kwargs, given)
            return func(*args, **kwargs)
        finally:
            operators.is_sized, operators.explained = before

    def _read(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run a function that may read sizes."""
        result = func(*args, **kwargs)
        if not args or not isinstance(args[0], Tensor):
            return result
        if isinstance(result, torch.Size):
            return self._operators.sizes(args[0], result)
        if type(result) is not int or func.__name__ == "__get__":
            return result
        sizes = self._operators.sizes(args[0], args[0].shape)
        if func.__name__ == "size":
            return sizes[args[1] if len(args) > 1 else kwargs["dim"]]
        found: Any = 1
        for size in sizes:
            found = size * found
        return found


def _watched(given: Iterable[Any]) -> Iterator[Any]:
    for value in given:
        if isinstance(value, slice):
            yield from _watched((value.start, value.stop, value.step))
        elif isinstance(value, Watched):
            yield value
