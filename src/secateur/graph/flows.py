"""Where the values in a forward pass come from: the same calls may be connected in another way."""

from __future__ import annotations

import functools
import operator
import weakref
from collections.abc import Iterable, Sequence
from types import FrameType
from typing import Any

from torch import Tensor, nn

_PARTS = frozenset(
    "__getitem__ __setitem__ select narrow index_select gather take take_along_dim masked_select roll flip "
    "fliplr flipud".split()
)
"""Names of functions that return a part of a value, or write it."""
_BITS = 1021
"""A source is two bits of this many. Two sources rarely have the same; then only their exchange is missed."""


class Flows:
    """From which tensors of the model those of a pass come, and which part of a result each is.

    Every tensor has a set of sources, as bits of an integer: parameters, buffers, and the places in the
    code that take a part of a value. Only values that come from the model's tensors have sources, since only
    these hold units. The sets do not grow for ever in a loop, so passes at two lengths have the same.
    """

    def __init__(self, model: nn.Module) -> None:
        """Prepare a pass of `model`."""
        self._own = {id(v) for v in model.buffers() if v.ndim}  # a counter holds no units
        self._known: dict[int, tuple[weakref.ref[Tensor], int]] = {}

    def of(self, value: Tensor) -> int:
        """The sources of a tensor."""
        known = self._known.get(id(value))
        if known is not None and known[0]() is value:
            return known[1]
        return _bit(id(value)) if id(value) in self._own or is_parameter(value) else 0

    def through(self, name: str, took: Iterable[Any], results: Sequence[Tensor], frame: FrameType) -> int:
        """Pass sources on from the arguments of a call to its results.

        Args:
            name: The name of the function.
            took: The arguments.
            results: The results. A call without any, as ``a[i] = b``, changes its first argument.
            frame: The code that makes the call.

        Returns:
            A number that tells the sources of its arguments from others.
        """
        tensors = [v for v in took if isinstance(v, Tensor)]
        sources = dict.fromkeys(map(self.of, tensors))
        sources.pop(0, None)
        if not sources:
            return 0
        made = functools.reduce(operator.or_, sources)
        into = results or tensors[:1]
        if name[-1:] == "_":  # it writes, also into what the result is a part of
            into = [*into, *(v._base for v in into if v._base is not None)]
            known = [made | self.of(v) for v in into]
        else:
            known = [made] * len(into)
        if results[1:] or name in _PARTS:
            place = hash((frame.f_code.co_filename, frame.f_code.co_firstlineno, frame.f_lasti))
            known = [source | _bit(hash((place, number))) for number, source in enumerate(known)]
        for result, source in zip(into, known, strict=True):
            self._known[id(result)] = weakref.ref(result), source
        # Python's hash of an integer is its remainder, so far bits would count as near ones.
        return hash(tuple(source.to_bytes(_BITS // 8 + 1, "little") for source in sources))


def is_parameter(value: Any) -> bool:
    """Whether a value is a parameter, also one of a class of its own."""
    return type(value) is nn.Parameter or getattr(value, "_is_param", False)


def _bit(source: int) -> int:
    mixed = hash((source, _BITS))  # identities are multiples of 16, often near each other
    return 1 << (mixed % _BITS) | 1 << ((mixed >> 24) % _BITS)
