"""The search for sizes at which a forward pass makes other calls, or comparisons have other outcomes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from secateur.graph.courses import Course
from secateur.graph.frames import Line
from secateur.graph.inputs import OpenAxis

FARTHEST = 16
"""An axis is tried at no more than this many times its traced size."""
TRIES = 8
"""The most sizes that comparisons suggest and that are tried for each axis."""
FRACTIONS = (1, 2, 3, 6, 8, 16)
"""Quarters of the traced size that are always tried for each axis."""
SMALL = (1, 2, 3, 4, 6)
"""Small sizes that are always tried for each axis."""
CHOICES = 2
"""A call to which the code gives so many different numbers, at all sizes, may choose between them."""
WORK = 4_000_000
"""The most numbers that the passes at these sizes compute for one axis, estimated from the traced pass."""

Sizes = tuple[int, ...]
"""A size of each open axis, in their order."""

CourseAt = Callable[[Sizes], "Course | None"]
"""A function that runs the forward pass at some sizes; None where the model does not run."""


def other_courses(
    axes: Sequence[OpenAxis],
    traced: Course,
    course_at: CourseAt,
    start: Sizes | None = None,
    elsewhere: Course | None = None,
) -> Search:
    """Search for sizes at which the forward pass runs other lines of code than at the traced ones.

    Comparisons of sizes say where to look: each axis is set to a size at which a comparison may have another
    outcome. Comparisons that only run there are followed as well. Not all can be watched, because ``int(n)``
    is a plain Python number. So some smaller and larger sizes are always tried. The search misses what
    neither shows, such as a table that ends at some other size.

    Args:
        axes: The axes that may vary.
        traced: The course at the sizes from which one axis at a time is changed.
        course_at: Runs the model at other sizes.
        start: These sizes; the traced ones if None.
        elsewhere: The course at the traced sizes, if they are others.

    Returns:
        The search. Its ``found`` has the sizes, one for each new course. They differ from the traced sizes in
        one axis where that is enough, else in several.
    """
    search = Search(axes, traced, course_at, start, elsewhere)
    for k, axis in enumerate(axes):  # code may ask for one sample by `len`, which cannot be watched
        for size in dict.fromkeys([axis.other, *([1] if axis.batch else [])]):
            if (there := _at(search.start, k, size)) != search.start:
                search.look(there)
    search.follow_comparisons()
    swept = _swept(axes, elsewhere or traced)
    for k, size in swept if elsewhere is None else _apart(search, swept):
        if (there := _at(search.start, k, size)) not in search.courses and there != search.start:
            search.look(there)
    search.follow_comparisons()
    search.follow_choices()
    return search


def other_ways(plain: Search, here: Course, course_at: CourseAt, *, sweep: bool = False) -> list[Sizes]:
    """Search for sizes at which another way to run the model runs lines of code that no other pass has shown.

    Such a way is training mode, or one answer to all conditions on values. No other pass is: neither this way
    at the traced sizes nor the plain one at the same sizes. The search looks at the sizes where a comparison
    had another outcome in the plain way, and follows comparisons that only this way makes.

    Args:
        plain: The search of the plain way.
        here: The course of this way at the sizes where the plain search started.
        course_at: Runs the model in this way at other sizes.
        sweep: Whether to try the sizes that no comparison suggests, too.
    """
    search = Search(plain.axes, here, course_at, plain.start)
    for sizes in plain.turned:
        search.look(sizes)
    search.follow_comparisons(but=frozenset(plain.compared))
    for k, size in _apart(search, _swept(plain.axes, here)) if sweep else ():
        if (there := _at(search.start, k, size)) not in search.courses and there != search.start:
            search.look(there)
    return [
        sizes
        for sizes in search.found
        if (other := plain.at(sizes)) is None or other.fixed != search.courses[sizes].fixed
    ]


def _swept(axes: Sequence[OpenAxis], traced: Course) -> list[tuple[int, int]]:
    """Return sizes, far apart, that are always tried for each axis but the batch, as far as they are cheap.

    One of them is a square and another is not: code often takes the root of the size of a grid of patches.
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


def _apart(search: Search, swept: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Set all axes that have a size to try to it at once; return what has to be tried axis by axis."""
    left = []
    for size in dict.fromkeys(size for _, size in swept):
        axes = [k for k, n in swept if n == size]
        there = search.start
        for k in axes:
            there = _at(there, k, size)
        if axes[1:] and there not in search.courses and there != search.start:
            search.look(there)
            if search.courses[there] is not None and there not in search.found:
                continue
        left += [(k, size) for k in axes]
    return left


class Search:
    """A search for sizes at which the forward pass has a new course.

    Attributes:
        axes: The axes that may vary.
        start: The sizes from which one axis at a time is changed.
        courses: The courses at the sizes that were tried; None where the model does not run.
        found: The sizes with a new course.
        turned: The sizes at which comparisons had new outcomes.
    """

    def __init__(
        self,
        axes: Sequence[OpenAxis],
        traced: Course,
        course_at: CourseAt,
        start: Sizes | None = None,
        elsewhere: Course | None = None,
    ) -> None:
        known = tuple(axis.size for axis in axes)
        self.axes, self.start = axes, known if start is None else start
        self.courses: dict[Sizes, Any] = {} if elsewhere is None else {known: elsewhere}
        self.found: list[Sizes] = []
        self.turned: list[Sizes] = []
        self._traced, self._course_at = traced, course_at
        self._pending, self._tries = [(self.start, traced)], [0] * len(axes)
        self._fixed, self._places = {traced.fixed}, {traced.places}
        self._lines = set(traced.lines)
        self._outcomes = {traced.outcomes}
        self._counts = {traced.counts}
        self._numbers, self._numbers_but_counts = {traced.numbers}, {traced.numbers_but_counts}

    @property
    def compared(self) -> set[tuple[Line, int]]:
        """The places of all comparisons."""
        courses = [self._traced, *(course for course in self.courses.values() if course is not None)]
        return {place for course in courses for place in course.compared}

    def at(self, sizes: Sizes) -> Course | None:
        """Return the course at some sizes. The model is run there if it was not."""
        if sizes == self.start:
            return self._traced
        return self.courses[sizes] if sizes in self.courses else self._course_at(sizes)

    def look(self, sizes: Sizes) -> None:
        """Run the model at these sizes."""
        course = self.courses[sizes] = self._course_at(sizes)
        if course is None:
            return
        # New numbers alone do not show a new course, as `len` makes them too. With a new outcome they do.
        turned = course.outcomes not in self._outcomes
        # Sources that are gone show none either: in the first round of a loop, the state has none.
        other = course.places not in self._places or not course.lines <= self._lines
        new = other or (turned and self._has_new_numbers(course))
        if new and course.fixed not in self._fixed:
            self.found.append(sizes)
        self._fixed.add(course.fixed)
        self._places.add(course.places)
        self._lines |= course.lines
        self._counts.add(course.counts)
        self._numbers.add(course.numbers)
        self._numbers_but_counts.add(course.numbers_but_counts)
        self._outcomes.add(course.outcomes)
        if turned:
            self.turned.append(sizes)
            self._pending.append((sizes, course))

    def _has_new_numbers(self, course: Course) -> bool:
        """Whether calls were given other numbers than in each pass before.

        Where no pass had the same results of `len`, numbers that equal one of them do not count.
        """
        if course.counts in self._counts:
            return course.numbers not in self._numbers
        return course.numbers_but_counts not in self._numbers_but_counts

    def follow_choices(self) -> None:
        """Count a pass as new where a call was given another of two numbers, or another string.

        Such is ``axis = 1 if int(n) > 8 else 2``, of which no comparison is seen. A number that follows from
        the size has more values.
        """
        ran = [(sizes, course) for sizes, course in self.courses.items() if course is not None]
        values: dict[Any, dict[Any, Sizes]] = {}
        for sizes, course in [(self.start, self._traced), *ran]:
            for call, numbers in course.numbers_but_counts:
                values.setdefault(call, {}).setdefault(numbers, sizes)
        for seen in values.values():
            strings = {tuple(n for n in numbers if type(n) is str) for numbers in seen}
            if len(seen) == CHOICES or len(strings) > 1:
                new = [sizes for sizes in seen.values() if sizes not in (self.start, *self.found)]
                self.found += new[: CHOICES - 1]

    def follow_comparisons(self, *, but: frozenset[tuple[Line, int]] = frozenset()) -> None:
        """Try sizes at which comparisons may have another outcome, except comparisons at the places `but`."""
        while self._pending:
            sizes, course = self._pending.pop(0)
            for k, size in _turning(self.axes, self.start, sizes, course, self.courses, but):
                there = _at(sizes, k, size)
                if there not in self.courses and there != self.start and self._tries[k] < TRIES:
                    self._tries[k] += 1
                    self.look(there)


def _at(sizes: Sizes, axis: int, size: int) -> Sizes:
    return (*sizes[:axis], size, *sizes[axis + 1 :])


def _turning(
    axes: Sequence[OpenAxis],
    start: Sizes,
    sizes: Sizes,
    course: Course,
    known: Mapping[Sizes, Course | None],
    but: frozenset[tuple[Line, int]],
) -> list[tuple[int, int]]:
    """Return axes with a size at which a comparison may have another outcome; nearest sizes first."""
    found: set[tuple[int, int]] = set()
    traced = known.get(tuple(axis.size for axis in axes))  # if the search starts elsewhere
    for k, axis in enumerate(axes):
        other = known.get(_at(start, k, axis.other)) or traced
        for place, comparisons in course.compared.items():
            if place in but:
                continue
            if len({outcome for *_, outcome in comparisons}) > 1:  # the last one ends a loop, or a tuple's
                comparisons = comparisons[-1:]
            if sizes == start and other is not None and other.compared.get(place) == comparisons:
                continue  # the comparison does not depend on this axis
            for size, wanted, period, _ in comparisons:
                steps = [sizes[k] + wanted - size, sizes[k] + wanted - size + period]
                if size > 0:  # it may be a part of the size, or its root
                    steps += [sizes[k] * (wanted / size) ** power for power in ((1, 2) if size % 1 else (1,))]
                else:
                    steps += [2 * sizes[k]]
                there = {math.ceil(n) for n in steps}
                found |= {(k, n) for n in there if 1 <= n <= FARTHEST * axis.size and n != sizes[k]}
    return sorted(found, key=lambda f: (abs(f[1] - sizes[f[0]]), f))
