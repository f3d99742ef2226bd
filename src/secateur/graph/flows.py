"""From which of the model's tensors each value in a forward pass comes.

Two passes may make the same calls, and connect their results in different ways.
"""

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
"""Names of functions that return a part of a value, or write into it."""
_BITS = 1021
"""A source is two bits of this many. If two sources have the same (rare), their exchange is missed."""


class Flows:
    """The sources of each tensor in one pass.

    Sources are parameters, buffers, and the places in the code that take a part of a value. A set of sources
    is an integer, with bits for each source. Only values that come from the model's tensors have sources,
    since only these hold units. The sets do not grow for ever in a loop, so passes at two lengths have the
    same.
    """

    def __init__(self, model: nn.Module) -> None:
        """Prepare a pass of `model`."""
        self._own = {id(v) for v in model.buffers() if v.ndim}  # a counter holds no units
        self._sources: dict[int, tuple[weakref.ref[Tensor], int]] = {}  # by the identity of a tensor

    def of(self, value: Tensor) -> int:
        """The sources of a tensor."""
        found = self._sources.get(id(value))
        if found is not None and found[0]() is value:
            return found[1]
        return _bit(id(value)) if id(value) in self._own or is_parameter(value) else 0

    def through(
        self, name: str, arguments: Iterable[Any], results: Sequence[Tensor], frame: FrameType
    ) -> int:
        """Pass sources on from the arguments of a call to its results.

        Args:
            name: The name of the function.
            arguments: The arguments.
            results: The results. A call without any, as ``a[i] = b``, changes its first argument.
            frame: The code that makes the call.

        Returns:
            A hash of the arguments' sources; 0 if they have none.
        """
        tensors = [v for v in arguments if isinstance(v, Tensor)]
        sources = dict.fromkeys(map(self.of, tensors))
        sources.pop(0, None)
        if not sources:
            return 0
        union = functools.reduce(operator.or_, sources)
        changed = results or tensors[:1]
        if name[-1:] == "_":  # it writes, also into what the result is a part of
            changed = [*changed, *(v._base for v in changed if v._base is not None)]
            new = [union | self.of(v) for v in changed]
        else:
            new = [union] * len(changed)
        if results[1:] or name in _PARTS:
            place = hash((frame.f_code.co_filename, frame.f_code.co_firstlineno, frame.f_lasti))
            new = [source | _bit(hash((place, number))) for number, source in enumerate(new)]
        for tensor, source in zip(changed, new, strict=True):
            self._sources[id(tensor)] = weakref.ref(tensor), source
        # Python's hash of an integer is its remainder, so far bits would count as near ones.
        return hash(tuple(source.to_bytes(_BITS // 8 + 1, "little") for source in sources))


def is_parameter(value: Any) -> bool:
    """Whether a value is a parameter, also one of a subclass."""
    return type(value) is nn.Parameter or getattr(value, "_is_param", False)


def _bit(source: int) -> int:
    mixed = hash((source, _BITS))  # identities are multiples of 16, often near each other
    return 1 << (mixed % _BITS) | 1 << ((mixed >> 24) % _BITS)
