"""Numbers that follow from sizes of tensors, and report what the user's code asks about them."""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Callable, Iterable
from types import FrameType
from typing import TYPE_CHECKING, Any, cast

from secateur.graph.frames import in_pytorch, line_of_user

if TYPE_CHECKING:
    from secateur.graph.executionpath import ExecutionPath

TABLE = 4
"""A remainder with at most this many values counts as compared, since it may choose from a table."""

_FLIPS = {"lt": (0, -1), "le": (1, 0), "gt": (0, 1), "ge": (-1, 0), "eq": (1, 0), "ne": (0, 1)}
"""What to add to the other number to get one with another outcome: if the comparison is true, or false."""


class Watched:
    """A number that follows from sizes. Comparisons in the user's code are noted by its recorder.

    The recorder is the `ExecutionPath` of the running pass, or another object with its method `note`. Numbers
    computed from this one are watched too. Where code makes a plain number or a text of it (``int(number)``),
    that counts as compared with all constants of this code.
    """

    recorder: ExecutionPath
    period: int
    """The divisor of a remainder; 0 for other numbers."""

    def __neg__(self) -> Any:
        return watched(-plain(self), self.recorder)

    def __pos__(self) -> Any:
        return watched(plain(self), self.recorder)

    def __abs__(self) -> Any:
        return watched(abs(plain(self)), self.recorder)

    def __round__(self, digits: Any = None) -> Any:
        return watched(round(plain(self), digits), self.recorder)

    def __divmod__(self, other: Any) -> Any:
        return self // other, self % other

    def __int__(self) -> int:
        self._leave()
        return int(plain(self))

    def __float__(self) -> float:
        self._leave()
        return float(plain(self))

    def __str__(self) -> str:
        self._leave()
        return str(plain(self))

    def __format__(self, form: str) -> str:
        self._leave()
        return format(plain(self), form)

    def _leave(self) -> None:
        """Note that the code takes this as a plain number, which may be compared with its constants."""
        note_constants(sys._getframe(2), plain(self), self.recorder)

    def note(self, name: str, other: Any, *, outcome: bool) -> None:
        """Record the outcome of a comparison with another number, if it is in the user's code."""
        frame = sys._getframe(2)
        if not in_pytorch(frame):
            place, flips_at = (line_of_user(frame), frame.f_lasti), plain(other) + _FLIPS[name][not outcome]
            self.recorder.note(place, plain(self), flips_at, outcome, period=self.period)


class Size(Watched, int):
    """A size of a tensor, or a whole number computed from sizes."""

    def __bool__(self) -> bool:
        outcome = bool(plain(self) != 0)
        self.note("ne", 0, outcome=outcome)
        return outcome

    def __hash__(self) -> int:
        frame = sys._getframe(1)  # a look-up in a set or a table; its keys may be constants of the code
        if not in_pytorch(frame):
            for number in constants(frame.f_code.co_consts):
                same = plain(self) == number
                self.recorder.note((line_of_user(frame), -number), plain(self), number + same, same)
        return int.__hash__(self)


class Ratio(Watched, float):
    """A fraction or a root of sizes, as ``n / 2`` and ``n ** 0.5``."""

    __hash__ = float.__hash__

    def __floor__(self) -> Any:
        return watched(math.floor(plain(self)), self.recorder)

    def __ceil__(self) -> Any:
        return watched(math.ceil(plain(self)), self.recorder)


def watched(value: Any, recorder: ExecutionPath, period: int = 0) -> Any:
    """Return a number whose comparisons `recorder` notes. Other values are returned as they are."""
    kind = {int: Size, float: Ratio}.get(type(value))
    if kind is None:
        return value
    new = kind(value)
    new.recorder, new.period = recorder, period
    return new


def plain(value: Any) -> Any:
    """Return the same number without the recorder."""
    return int.__int__(value) if isinstance(value, int) else float.__float__(value)


def note_constants(frame: FrameType, value: float, recorder: ExecutionPath) -> None:
    """Note a number as compared with each constant of the user's code that runs in a frame."""
    if not in_pytorch(frame):
        for number in constants(frame.f_code.co_consts):
            recorder.note((line_of_user(frame), -number), value, number + (value <= number), value > number)


def _comparison(name: str, base: type) -> Callable[[Any, Any], Any]:
    """Make a comparison that is recorded."""
    compute, usual = getattr(operator, name), getattr(base, f"__{name}__")

    def compare(self: Any, other: Any) -> Any:
        if not isinstance(other, int | float):
            return usual(self, other)
        outcome = compute(plain(self), plain(other))
        self.note(name, other, outcome=outcome)
        return outcome

    return compare


def _computed(name: str, base: type, *, reflected: bool) -> Callable[..., Any]:
    """Make an arithmetic operator whose result is watched too."""
    compute, usual = getattr(operator, name), getattr(base, f"__{'r' * reflected}{name.removesuffix('_')}__")

    def computed(self: Any, other: Any, *rest: Any) -> Any:
        if rest or not isinstance(other, int | float):
            self._leave()  # for example, for the length of a list
            return usual(self, other, *rest)
        one, two = plain(self), plain(other)
        value = compute(two, one) if reflected else compute(one, two)
        second = getattr(other, "recorder", self.recorder)
        recorder = second if getattr(second, "prevails", False) else self.recorder
        period = two if name == "mod" and not reflected and type(value) is int else 0
        if name == "and_" and two & (two + 1) == 0:  # the remainder by a power of two
            period = two + 1
        if 1 < period <= TABLE:
            frame = sys._getframe(1)
            self.recorder.note((line_of_user(frame), frame.f_lasti), value, value + 1, value)
        return watched(value, recorder, period)

    return computed


for _kind, _base in cast("list[tuple[type, type]]", [(Size, int), (Ratio, float)]):
    for _name in _FLIPS:
        setattr(_kind, f"__{_name}__", _comparison(_name, _base))
    for _name in ("add", "sub", "mul", "floordiv", "mod", "truediv", "pow"):
        for _reflected in (False, True):
            _method = f"__{'r' * _reflected}{_name}__"
            setattr(_kind, _method, _computed(_name, _base, reflected=_reflected))
for _name in ("and_", "or_", "xor", "lshift", "rshift"):
    _method = f"__{_name.removesuffix('_')}__"
    setattr(Size, _method, _computed(_name, int, reflected=False))
    setattr(Size, _method.replace("__", "__r", 1), _computed(_name, int, reflected=True))


def constants(values: Iterable[Any]) -> list[int]:
    """Return the whole numbers above 1 among the constants of code, also in sets and tuples."""
    inner = (constants(v) for v in values if isinstance(v, tuple | frozenset))
    own = [math.floor(v) for v in values if type(v) in (int, float) and 1 < v < math.inf]
    return own + [v for vs in inner for v in vs]
