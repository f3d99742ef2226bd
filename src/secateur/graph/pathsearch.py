"""The search for sizes at which the forward pass takes another execution path than at the traced sizes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from secateur.graph.executionpath import ExecutionPath
from secateur.graph.frames import Line
from secateur.graph.inputs import OpenAxis

FARTHEST = 16
"""An axis is tried at up to this many times its traced size, and beyond where that costs little."""
STEPS = 4
"""How often a size is corrected at which a comparison did not change, though it should have."""
CALLS = 50_000
"""The most calls of a pass at such a size, if all of them are in a loop over the axis."""
TRIES = 8
"""The most sizes that comparisons suggest and that are tried for each axis."""
FRACTIONS = (1, 2, 3, 6, 8, 16)
"""Quarters of the traced size that are always tried for each axis."""
SMALL = (1, 2, 3, 4, 6)
"""Small sizes that are always tried for each axis."""
CHOICES = 2
"""A call to which the code gives so many different numbers, at all sizes, may choose between them."""
CONSTANTS = 10
"""The most constants of the code that are tried as sizes of each axis, if cheap."""
LOGARITHM = 12
"""Constants up to this one may be the logarithm of a size."""
WORK = 4_000_000
"""The most numbers that the passes at these sizes compute for one axis, estimated from the traced pass."""

Sizes = tuple[int, ...]
"""A size of each open axis, in their order."""

PathAt = Callable[[Sizes], "ExecutionPath | None"]
"""Runs the forward pass at some sizes and returns its execution path; None where the model does not run."""


def search_other_paths(
    axes: Sequence[OpenAxis],
    at_start: ExecutionPath,
    path_at: PathAt,
    start: Sizes | None = None,
    at_traced: ExecutionPath | None = None,
) -> PathSearch:
    """Search for sizes at which the forward pass takes another execution path than at the traced sizes.

    Comparisons of sizes show what to try: each axis is set to a size at which a comparison may have another
    outcome. Comparisons that only run there are followed as well. Not all can be watched, because ``int(n)``
    is a plain Python number. So some smaller and larger sizes are always tried, and those that are constants
    of the code. The search misses what none of these shows, such as a table that ends at some other size.

    Args:
        axes: The axes that may vary.
        at_start: The path at the sizes `start`.
        path_at: Runs the model at other sizes.
        start: The sizes from which one axis at a time is changed; the traced ones if None.
        at_traced: The path at the traced sizes, where `start` has other sizes.

    Returns:
        The search. Its ``found`` has the sizes, one for each new path. They differ from the traced sizes in
        one axis where that is enough, else in several.
    """
    search = PathSearch(axes, at_start, path_at, start, at_traced)
    for k, axis in enumerate(axes):  # code may ask for one sample by `len`, which cannot be watched
        for size in dict.fromkeys([axis.other, *([1] if axis.batch else [])]):
            if (there := _at(search.start, k, size)) != search.start:
                search.try_sizes(there)
    search.follow_comparisons()
    swept = _swept(axes, at_traced or at_start)
    for k, size in swept if at_traced is None else _try_together(search, swept):
        if (there := _at(search.start, k, size)) not in search.paths and there != search.start:
            search.try_sizes(there)
    search.follow_comparisons()
    search.follow_choices()
    return search


def search_variant(
    plain: PathSearch, at_start: ExecutionPath, path_at: PathAt, *, sweep: bool = False
) -> list[Sizes]:
    """Search for sizes at which a variant of the forward pass takes an execution path of its own.

    A variant is the pass in training mode, or with one answer to all conditions on values. A path is its own
    if the plain pass at the same sizes takes another one, and so does the variant at the start. The search
    tries the sizes at which a comparison had another outcome in the plain search, and those that follow from
    comparisons which only the variant makes.

    Args:
        plain: The search with the plain forward pass.
        at_start: The path of the variant at the sizes where the plain search started.
        path_at: Runs the variant at other sizes.
        sweep: Whether to try the sizes that no comparison suggests, too.
    """
    search = PathSearch(plain.axes, at_start, path_at, plain.start)
    for sizes in plain.with_new_outcomes:
        search.try_sizes(sizes)
    search.follow_comparisons(except_at=frozenset(plain.compared))
    for k, size in _try_together(search, _swept(plain.axes, at_start)) if sweep else ():
        if (there := _at(search.start, k, size)) not in search.paths and there != search.start:
            search.try_sizes(there)
    return [
        sizes
        for sizes in search.found
        if (other := plain.at(sizes)) is None
        or other.calls_with_constants != search.paths[sizes].calls_with_constants
    ]


def _swept(axes: Sequence[OpenAxis], path: ExecutionPath) -> list[tuple[int, int]]:
    """Return axes, each with a size that is always tried: some far smaller and larger ones, if cheap.

    The batch has none. One of the sizes is a square and another is not: code often takes the root of the
    size of a grid of patches.
    """
    found = []
    for k, axis in enumerate(axes):
        left = WORK
        square = (math.isqrt(axis.size) + 1) ** 2
        few = sorted(path.constants)[:CONSTANTS]
        written = [size for n in few for size in (n, n + 1, n * n, (n + 1) ** 2)]  # code may take the root
        written += [2**n + 1 for n in sorted(path.constants) if n <= LOGARITHM]
        usual = *SMALL, *(axis.size * quarters // 4 for quarters in FRACTIONS), square
        for size in dict.fromkeys((*usual, *written)):
            left -= path.work * size // axis.size
            if size not in (0, axis.size) and left >= 0 and not axis.batch:
                found.append((k, size))
    return found


def _try_together(search: PathSearch, swept: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Try each size on all its axes at once. Return the axes and sizes that have to be tried one by one.

    These are the ones where the pass failed, or showed a new path.
    """
    left = []
    for size in dict.fromkeys(size for _, size in swept):
        axes = [k for k, n in swept if n == size]
        there = search.start
        for k in axes:
            there = _at(there, k, size)
        if axes[1:] and there not in search.paths and there != search.start:
            search.try_sizes(there)
            if search.paths[there] is not None and there not in search.found:
                continue
        left += [(k, size) for k in axes]
    return left


class PathSearch:
    """A search for sizes at which the forward pass takes a new execution path.

    Attributes:
        axes: The axes that may vary.
        start: The sizes from which one axis at a time is changed.
        paths: The paths at the sizes that were tried; None where the model does not run.
        found: The sizes with a new path.
        with_new_outcomes: The sizes at which comparisons had new outcomes.
    """

    def __init__(
        self,
        axes: Sequence[OpenAxis],
        at_start: ExecutionPath,
        path_at: PathAt,
        start: Sizes | None = None,
        at_traced: ExecutionPath | None = None,
    ) -> None:
        traced = tuple(axis.size for axis in axes)
        self.axes, self.start = axes, traced if start is None else start
        self.paths: dict[Sizes, Any] = {} if at_traced is None else {traced: at_traced}
        self.found: list[Sizes] = []
        self.with_new_outcomes: list[Sizes] = []
        self._at_start, self._path_at = at_start, path_at
        self._pending, self._tries = [(self.start, at_start)], [0] * len(axes)
        self._with_constants, self._without_sources = (
            {at_start.calls_with_constants},
            {at_start.calls_without_sources},
        )
        self._calls = set(at_start.distinct_calls)
        self._outcomes = {at_start.outcomes}
        self._lengths = {at_start.lengths}
        self._numbers, self._numbers_but_lengths = {at_start.numbers}, {at_start.numbers_but_lengths}

    @property
    def compared(self) -> set[tuple[Line, int]]:
        """The places in the code of all comparisons."""
        paths = [self._at_start, *(path for path in self.paths.values() if path is not None)]
        return {place for path in paths for place in path.compared}

    def at(self, sizes: Sizes) -> ExecutionPath | None:
        """Return the path at some sizes. The model is run there if it has not been."""
        if sizes == self.start:
            return self._at_start
        return self.paths[sizes] if sizes in self.paths else self._path_at(sizes)

    def try_sizes(self, sizes: Sizes) -> None:
        """Run the model at these sizes, and note whether its path is new."""
        path = self.paths[sizes] = self._path_at(sizes)
        if path is None:
            return
        # New numbers alone do not show a new path, as `len` makes them too. With a new outcome they do.
        has_new_outcome = path.outcomes not in self._outcomes
        # Nor do missing sources: in the first round of a loop, the state has none.
        is_known = path.calls_without_sources in self._without_sources and path.distinct_calls <= self._calls
        new = not is_known or (has_new_outcome and self._has_new_numbers(path))
        if new and path.calls_with_constants not in self._with_constants:
            self.found.append(sizes)
        self._with_constants.add(path.calls_with_constants)
        self._without_sources.add(path.calls_without_sources)
        self._calls |= path.distinct_calls
        self._lengths.add(path.lengths)
        self._numbers.add(path.numbers)
        self._numbers_but_lengths.add(path.numbers_but_lengths)
        self._outcomes.add(path.outcomes)
        if has_new_outcome:
            self.with_new_outcomes.append(sizes)
            self._pending.append((sizes, path))

    def _has_new_numbers(self, path: ExecutionPath) -> bool:
        """Whether calls were given other numbers than in each pass before.

        Where no pass had the same results of `len`, numbers that equal one of them do not count.
        """
        if path.lengths in self._lengths:
            return path.numbers not in self._numbers
        return path.numbers_but_lengths not in self._numbers_but_lengths

    def follow_choices(self) -> None:
        """Take a pass as new where a call was given the other one of two numbers, or another string.

        An example is ``axis = 1 if int(n) > 8 else 2``: this comparison is not seen. A number that follows
        from the size has more than two values.
        """
        ran = [(sizes, path) for sizes, path in self.paths.items() if path is not None]
        values: dict[Any, dict[Any, Sizes]] = {}
        for sizes, path in [(self.start, self._at_start), *ran]:
            for call, numbers in path.numbers_but_lengths:
                values.setdefault(call, {}).setdefault(numbers, sizes)
        for seen in values.values():
            strings = {tuple(n for n in numbers if type(n) is str) for numbers in seen}
            if len(seen) == CHOICES or len(strings) > 1:
                new = [sizes for sizes in seen.values() if sizes not in (self.start, *self.found)]
                self.found += new[: CHOICES - 1]

    def follow_comparisons(self, *, except_at: frozenset[tuple[Line, int]] = frozenset()) -> None:
        """Try sizes at which comparisons may have another outcome, but not for those at `except_at`."""
        farthest = [self._farthest(k) for k in range(len(self.axes))]
        while self._pending:
            sizes, path = self._pending.pop(0)
            wanted = _sizes_to_try(self.axes, self.start, sizes, path, self.paths, except_at, farthest)
            for k, size in wanted:
                self._try_along(k, sizes, size)
                for _ in range(STEPS):
                    nearer = self._nearer(k, sizes, path, _at(sizes, k, size), except_at)
                    if nearer is None or not 1 <= nearer <= farthest[k]:
                        break
                    size = nearer
                    self._try_along(k, sizes, size)

    def _try_along(self, k: int, sizes: Sizes, size: int) -> None:
        there = _at(sizes, k, size)
        if there not in self.paths and there != self.start and self._tries[k] < TRIES:
            self._tries[k] += 1
            self.try_sizes(there)

    def _nearer(
        self, k: int, sizes: Sizes, path: ExecutionPath, there: Sizes, except_at: frozenset[tuple[Line, int]]
    ) -> int | None:
        """Return a size at which a comparison may change that nothing has changed yet: by a straight line."""
        after = self.paths.get(there)
        after_there = {} if after is None else after.compared
        ran = [one for one in self.paths.values() if one is not None]
        for place, comparisons in path.compared.items():
            then = after_there.get(place, [])
            if place in except_at or place[1] < 0 or len(comparisons) != 1 or len(then) != 1:
                continue
            (number, flips_at, _, outcome), (now, *_) = comparisons[0], then[0]
            if any(one.compared.get(place, [(0, 0, 0, outcome)])[-1][-1] != outcome for one in ran):
                continue
            if now != number:
                slope: float = (there[k] - sizes[k]) / (now - number)
                nearer = sizes[k] + (flips_at - number) * slope
                return math.ceil(nearer) if math.isfinite(nearer) else None
            if number == 0:  # rounded down
                return 2 * there[k]
        return None

    def _farthest(self, k: int) -> float:
        """Return the largest size at which an axis is tried: as far as the pass costs little.

        The work is taken to grow as it does between the first size and the other one.
        """
        axis, first = self.axes[k], self.start[k]
        other = self.paths.get(_at(self.start, k, axis.other))
        reach = 0.0
        if other is not None and axis.other != first and other.work and self._at_start.work:
            growth = math.log(other.work / self._at_start.work) / math.log(axis.other / first)
            further = (WORK / self._at_start.work) ** (1 / max(growth, 1))
            reach = first * min(further, CALLS / max(len(other.calls), len(self._at_start.calls), 1))
        return max(FARTHEST * axis.size, reach)


def _at(sizes: Sizes, axis: int, size: int) -> Sizes:
    return (*sizes[:axis], size, *sizes[axis + 1 :])


def _sizes_to_try(
    axes: Sequence[OpenAxis],
    start: Sizes,
    sizes: Sizes,
    path: ExecutionPath,
    paths: Mapping[Sizes, ExecutionPath | None],
    except_at: frozenset[tuple[Line, int]],
    farthest: Sequence[float],
) -> list[tuple[int, int]]:
    """Return axes with a size at which a comparison may have another outcome; nearest sizes first."""
    found: set[tuple[int, int]] = set()
    traced = paths.get(tuple(axis.size for axis in axes))  # if the search starts at other sizes
    for k, axis in enumerate(axes):
        other = paths.get(_at(start, k, axis.other)) or traced
        for place, comparisons in path.compared.items():
            if place in except_at:
                continue
            if len({outcome for *_, outcome in comparisons}) > 1:  # the last one ends a loop, or a tuple's
                comparisons = comparisons[-1:]
            same = sizes == start and other is not None and other.compared.get(place) == comparisons
            if same and any(number for number, *_ in comparisons):  # what is 0 may be rounded down
                continue  # the comparison does not depend on this axis
            for number, flips_at, period, _ in comparisons:
                wanted = [sizes[k] + flips_at - number, sizes[k] + flips_at - number + period]
                if number > 0 and flips_at > 0:  # it may be a part of the size, or its root
                    powers = (1, 2) if number % 1 else (1, 0.5)  # or a product of sizes
                    wanted += [sizes[k] * (flips_at / number) ** power for power in powers]
                elif number <= 0:
                    wanted += [2 * sizes[k]]
                rounded = {math.ceil(n) for n in wanted if math.isfinite(n)}
                found |= {(k, n) for n in rounded if 1 <= n <= farthest[k] and n != sizes[k]}
    return sorted(found, key=lambda f: (abs(f[1] - sizes[f[0]]), f))
