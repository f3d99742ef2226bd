"""Which way a forward pass goes: the calls it makes, and how its comparisons of sizes come out."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from secateur.graph.inputs import OpenAxis

_LIBRARY = str(Path(torch.__file__).parent)

FARTHEST = 16
"""So many times longer an axis may get to see what a forward pass does there."""
TRIES = 8
"""Most sizes that are tried for each axis beside the first two."""
FRACTIONS = (1, 2, 3, 6, 8, 16)
"""Quarters of the traced size that are tried for each axis, whatever is compared; with small sizes."""
SMALL = (1, 2, 3, 4, 6)
WORK = 4_000_000
"""Most numbers that the passes at these sizes compute for one axis; the traced pass tells how many."""
TABLE = 4
"""A remainder of at most this many values may choose from a table, which no comparison shows."""

Line = tuple[str, int]
"""File and number of a line."""

Call = tuple[str, Line, tuple[int, ...]]
"""Name of a torch function, the line that called it, and the parameters it took, by identity."""

Asked = tuple[tuple[Call, tuple[int, ...]], ...]
"""Calls, each with numbers that it took."""

Compared = tuple[int, int, int, int]
"""A size that was compared, the value at which the comparison comes out otherwise, the divisor if it is a
remainder (else 0), and how it came out: a remainder that is not compared comes out as its value.
"""

Sizes = tuple[int, ...]
"""A size of each open axis, in their order."""

CourseAt = Callable[[Sizes], "Course | None"]
"""What the forward pass does at some sizes; None where it does not run."""


class Course(TorchFunctionMode):
    """What a forward pass does while this is active.

    Attributes:
        calls: The calls of torch functions, each with the numbers it took and the shapes of what it
            returned. What PyTorch's own modules call is one call without a name: some do more in training
            mode, and mean the same.
        compared: The comparisons of sizes, by the place in the code.
        work: How many numbers all calls together returned.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Call, tuple[Any, ...]]] = []
        self.work = 0
        self.compared: dict[tuple[Line, int], list[Compared]] = {}
        self._counts: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the call and write it down; sizes that it returns are watched."""
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in ("__get__", "size", "numel"):
            return self._watched(result)
        frame = sys._getframe(1)
        if frame.f_code.co_name == "handle_torch_function":  # a Python function of PyTorch
            frame = _caller(_caller(frame))
        if name == "__len__" and type(result) is int:
            self._counted(result, frame)
            return result
        took = pytree.tree_leaves((args, kwargs))
        shapes = [v.shape for v in pytree.tree_leaves(result) if isinstance(v, torch.Tensor)]
        self.work += sum(map(math.prod, shapes))
        held = tuple(id(v) for v in took if isinstance(v, nn.Parameter))
        if frame.f_code.co_filename.startswith(_LIBRARY):
            self._inside(_line(frame), held)
            return result
        numbers = [v for v in took if type(v) in (int, _Size)]
        self.calls.append(((name, _line(frame), held), (*numbers, *shapes)))
        return result

    def _inside(self, line: Line, held: tuple[int, ...]) -> None:
        """Note what a module of PyTorch's calls, as one call for all in one line of the user's."""
        before: tuple[int, ...] = ()
        if self.calls and self.calls[-1][0][:2] == ("", line):
            before = self.calls.pop()[0][2]
        self.calls.append((("", line, tuple(dict.fromkeys(before + held))), ()))

    def _counted(self, count: int, frame: FrameType) -> None:
        """Note what `len` gave. It cannot be watched: it counts as compared with the code's constants."""
        self._counts.add(count)
        for number in _constants(frame.f_code.co_consts):
            self.note((_line(frame), -number), count, number + (count <= number), count > number)

    def note(
        self, place: tuple[Line, int], size: int, turning: int, outcome: int, *, period: int = 0
    ) -> None:
        """Note a comparison of a size; see `Compared`."""
        self.compared.setdefault(place, []).append((size, turning, period, outcome))

    def _watched(self, value: Any) -> Any:
        if isinstance(value, torch.Size):
            return torch.Size([_Size.of(v, self) for v in value])
        return _Size.of(value, self) if type(value) is int else value

    @property
    def fixed(self) -> Asked:
        """The calls in order, with the numbers that are no sizes."""
        return tuple((call, tuple(n for n in ns if type(n) is int)) for call, ns in self.calls)

    @property
    def asked(self) -> Asked:
        """The calls in order, with all numbers, but without the shapes of what they returned."""
        return tuple((call, tuple(int(n) for n in ns if isinstance(n, int))) for call, ns in self.calls)

    @property
    def lines(self) -> frozenset[Call]:
        """The calls without numbers and shapes, each once: a loop may run more often for longer inputs."""
        return frozenset(call for call, _ in self.calls)

    @property
    def numbers(self) -> frozenset[Any]:
        """The lines, each with the numbers of its first call that neither are sizes nor come from `len`."""
        first = dict(reversed(self.fixed))
        return frozenset((key, tuple(n for n in ns if n not in self._counts)) for key, ns in first.items())

    @property
    def outcomes(self) -> frozenset[Any]:
        """How the comparisons of sizes come out, by the place in the code; repeated outcomes count once."""
        return frozenset(
            (place, tuple(outcome for outcome, _ in groupby(outcome for *_, outcome in found)))
            for place, found in self.compared.items()
        )


class _Size(int):
    """A size of a tensor, or what was computed from some; its comparisons in the user's code are noted."""

    course: Course
    period: int
    """The divisor of a remainder; 0 for other numbers."""

    @classmethod
    def of(cls, value: int, course: Course, period: int = 0) -> _Size:
        new = cls(value)
        new.course, new.period = course, period
        return new

    def __neg__(self) -> _Size:
        return _Size.of(-int(self), self.course)

    def __bool__(self) -> bool:
        outcome = int(self) != 0
        self.note("__ne__", 0, outcome=outcome)
        return outcome

    def __hash__(self) -> int:
        frame = sys._getframe(1)  # a look into a set or a table of the user's, whose keys may stand there
        if not frame.f_code.co_filename.startswith(_LIBRARY):
            for number in _constants(frame.f_code.co_consts):
                same = int(self) == number
                self.course.note((_line(frame), -number), int(self), number + same, same)
        return int.__hash__(self)

    def note(self, name: str, other: Any, *, outcome: bool) -> None:
        frame = sys._getframe(2)
        if isinstance(other, int) and not frame.f_code.co_filename.startswith(_LIBRARY):
            place, turning = (_line(frame), frame.f_lasti), int(other) + _TURNS[name][not outcome]
            self.course.note(place, int(self), turning, outcome, period=self.period)


_TURNS = {
    "__lt__": (0, -1),
    "__le__": (1, 0),
    "__gt__": (0, 1),
    "__ge__": (-1, 0),
    "__eq__": (1, 0),
    "__ne__": (0, 1),
}
"""What to add to the other number to get a size at which a true, or a false, comparison turns."""


def _comparison(name: str) -> Callable[[_Size, Any], Any]:
    plain = getattr(int, name)

    def compare(self: _Size, other: Any) -> Any:
        outcome = plain(self, other)
        if isinstance(outcome, bool):
            self.note(name, other, outcome=outcome)
        return outcome

    return compare


def _computed(name: str) -> Callable[[_Size, Any], Any]:
    plain = getattr(int, name)

    def compute(self: _Size, other: Any) -> Any:
        value = plain(self, other)
        if type(value) is not int:
            return value
        period = int(other) if name == "__mod__" else 0
        if 1 < period <= TABLE:
            place = (_line(sys._getframe(1)), sys._getframe(1).f_lasti)
            self.course.note(place, value, value + 1, value)
        return _Size.of(value, self.course, period)

    return compute


for _name in _TURNS:
    setattr(_Size, _name, _comparison(_name))
for _name in ("add", "sub", "mul", "floordiv", "mod"):
    for _side in (f"__{_name}__", f"__r{_name}__"):
        setattr(_Size, _side, _computed(_side))


def _constants(held: Iterable[Any]) -> list[int]:
    """The integers above 1 among a code's constants, and in its constant sets and tuples."""
    inner = (_constants(v) for v in held if isinstance(v, tuple | frozenset))
    return [v for v in held if type(v) is int and v > 1] + [v for vs in inner for v in vs]


def _caller(frame: FrameType) -> FrameType:
    return frame if frame.f_back is None else frame.f_back


def _line(frame: FrameType | None) -> Line:
    """The innermost line outside of PyTorch."""
    while frame is not None and frame.f_code.co_filename.startswith(_LIBRARY):
        frame = frame.f_back
    return ("", 0) if frame is None else (frame.f_code.co_filename, frame.f_lineno)


def other_courses(
    axes: Sequence[OpenAxis],
    traced: Course,
    course_at: CourseAt,
) -> Search:
    """Sizes at which the forward pass does something else than at the traced ones.

    Its comparisons of sizes say where to look: each axis is brought to a size at which a comparison may come
    out otherwise. What is compared only there is followed too. Not all comparisons can be watched (``int(n)``
    and ``n / 2`` are Python's own numbers), so some small, smaller and larger sizes are tried in any case.
    Not found is what neither shows: a table that ends somewhere else.

    Args:
        axes: The axes that may vary.
        traced: What happened at the traced sizes.
        course_at: What happens at other sizes; None where the model does not run.

    Returns:
        The search; ``found`` has sizes, a way each. Most differ from the traced ones in one axis; in several
        only where the way is open to no axis alone.
    """
    search = Search(axes, traced, course_at)
    for k, axis in enumerate(axes):  # `len` gives Python's own integers, and code asks for one sample so
        for size in dict.fromkeys([axis.other, *([1] if axis.batch else [])]):
            search.look(_at(search.start, k, size))
    search.follow_comparisons()
    for k, size in _swept(axes, traced):
        if (there := _at(search.start, k, size)) not in search.courses:
            search.look(there)
    search.follow_comparisons()
    return search


def other_training(plain: Search, learning: Course, course_at: CourseAt) -> list[Sizes]:
    """Sizes at which training mode goes a way that it goes neither at the traced sizes nor evaluation there.

    Looked at are the sizes at which a comparison came out otherwise in evaluation mode, and what training
    mode alone compares.

    Args:
        plain: The search in evaluation mode.
        learning: What happened in training mode at the traced sizes.
        course_at: What happens in training mode at other sizes.
    """
    search = Search(plain.axes, learning, course_at)
    for sizes in plain.turned:
        search.look(sizes)
    search.follow_comparisons(but=frozenset(plain.compared))
    return [
        sizes
        for sizes in search.found
        if (evaluated := plain.at(sizes)) is None or evaluated.fixed != search.courses[sizes].fixed
    ]


def _swept(axes: Sequence[OpenAxis], traced: Course) -> list[tuple[int, int]]:
    """Axes but the batch, each with sizes far apart that are tried in any case, as far as they are cheap.

    One of them is a square, and one is not: a grid of patches is often asked for by the root of its size.
    """
    found = []
    for k, axis in enumerate(axes):
        left = WORK
        square = (math.isqrt(axis.size) + 1) ** 2
        for size in dict.fromkeys((*SMALL, *(axis.size * quarters // 4 for quarters in FRACTIONS), square)):
            left -= traced.work * size // axis.size
            if size not in (0, axis.size) and left >= 0 and not axis.batch:
                found.append((k, size))
    return found


class Search:
    """A search for ways of the forward pass at other sizes.

    Attributes:
        axes: The axes that may vary.
        start: Their traced sizes.
        courses: What happened at the sizes that were tried; None where the model does not run.
        found: Sizes at which it went a new way.
        turned: Sizes at which comparisons came out as nowhere before.
    """

    def __init__(self, axes: Sequence[OpenAxis], traced: Course, course_at: CourseAt) -> None:
        self.axes, self.start = axes, tuple(axis.size for axis in axes)
        self.courses: dict[Sizes, Any] = {}
        self.found: list[Sizes] = []
        self.turned: list[Sizes] = []
        self._traced, self._course_at = traced, course_at
        self._pending, self._tries = [(self.start, traced)], [0] * len(axes)
        self._fixed, self._lines = {traced.fixed}, {traced.lines}
        self._numbers, self._outcomes = {traced.numbers}, {traced.outcomes}

    @property
    def compared(self) -> set[tuple[Line, int]]:
        """The places of all comparisons."""
        courses = [self._traced, *(course for course in self.courses.values() if course is not None)]
        return {place for course in courses for place in course.compared}

    def at(self, sizes: Sizes) -> Course | None:
        """What happens at some sizes, which are tried if they were not."""
        if sizes == self.start:
            return self._traced
        return self.courses[sizes] if sizes in self.courses else self._course_at(sizes)

    def look(self, sizes: Sizes) -> None:
        """Run the model at these sizes."""
        course = self.courses[sizes] = self._course_at(sizes)
        if course is None:
            return
        # Numbers of its own show a new way only together with a comparison: `len` makes such numbers too.
        turned = course.outcomes not in self._outcomes
        new = course.lines not in self._lines or (turned and course.numbers not in self._numbers)
        if new and course.fixed not in self._fixed:
            self.found.append(sizes)
        self._fixed.add(course.fixed)
        self._lines.add(course.lines)
        self._numbers.add(course.numbers)
        self._outcomes.add(course.outcomes)
        if turned:
            self.turned.append(sizes)
            self._pending.append((sizes, course))

    def follow_comparisons(self, *, but: frozenset[tuple[Line, int]] = frozenset()) -> None:
        """Bring the axes to sizes at which comparisons may come out otherwise, except at some places."""
        while self._pending:
            sizes, course = self._pending.pop(0)
            for k, size in _turning(self.axes, sizes, course, self.courses, but):
                there = _at(sizes, k, size)
                if there not in self.courses and there != self.start and self._tries[k] < TRIES:
                    self._tries[k] += 1
                    self.look(there)


def _at(sizes: Sizes, axis: int, size: int) -> Sizes:
    return (*sizes[:axis], size, *sizes[axis + 1 :])


def _turning(
    axes: Sequence[OpenAxis],
    sizes: Sizes,
    course: Course,
    known: Mapping[Sizes, Course | None],
    but: frozenset[tuple[Line, int]],
) -> list[tuple[int, int]]:
    """Axes, and sizes of them at which comparisons may come out otherwise, the nearest first."""
    found: set[tuple[int, int]] = set()
    start = tuple(axis.size for axis in axes)
    for k, axis in enumerate(axes):
        other = known.get(_at(start, k, axis.other))
        for place, comparisons in course.compared.items():
            if place in but or len({outcome for *_, outcome in comparisons}) > 1:
                continue
            if sizes == start and other is not None and other.compared.get(place) == comparisons:
                continue  # this axis has no part in it
            for size, wanted, period, _ in comparisons:
                steps = [sizes[k] + wanted - size, sizes[k] + wanted - size + period]
                steps += [math.ceil(sizes[k] * wanted / size) if size > 0 else 2 * sizes[k]]
                found |= {(k, n) for n in steps if 1 <= n <= FARTHEST * axis.size and n != sizes[k]}
    return sorted(found, key=lambda f: (abs(f[1] - sizes[f[0]]), f))
