"""Find input sizes at which a captured program may be wrong: where the capture's conditions on sizes end."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch.export import ExportedProgram

from secateur.graph.leaf import Place
from secateur.graph.nodes import hint, is_open
from secateur.graph.programs import inputs_of

FARTHEST = 5000
"""The largest size at which the model itself is run, to compare it beyond a boundary."""
NUMBERS = 2**24
"""Largest number of entries in all inputs of such a run."""
LAST = 2**20
"""Conditions are evaluated up to this size."""
STEPS = 300
"""Each condition is evaluated at this many sizes next to the captured one, and then at each doubling."""
MOST_SIZES = 12
"""Largest number of boundary sizes of one axis; the nearest ones are taken."""


def boundary_sizes(program: ExportedProgram, *, ranges: bool = False) -> list[dict[Place, int]]:
    """Return sizes to compare at: size 1 of each open axis, and the nearest sizes at which a condition fails.

    A capture follows one path through the code, and is valid under the conditions on sizes that the code
    tested. A file does not hold all of these conditions. So at other sizes the model may run other code.

    Args:
        program: A program in which some axes are open.
        ranges: Whether the file holds the program's ranges of sizes. Then sizes outside are left out.

    Returns:
        For each such size, the axes that have it. Tensors are numbered.
    """
    axes: dict[sympy.Symbol, list[Place]] = {}
    hints: dict[sympy.Symbol, int] = {}
    environment: Any = None
    taken = [n.meta["val"] for n in inputs_of(program) if isinstance(n.meta.get("val"), torch.Tensor)]
    for number, value in enumerate(taken):
        for axis, size in enumerate(value.shape):
            if is_open(size) and isinstance(size.node.expr, sympy.Symbol):
                environment = size.node.shape_env
                axes.setdefault(size.node.expr, []).append((str(number), axis))
                hints[size.node.expr] = hint(size)
    if environment is None:
        return []
    conditions = {environment.replace(guard.expr) for guard in environment.guards}
    found: dict[sympy.Symbol, set[int]] = {symbol: {1} for symbol in axes}
    for condition in conditions:
        free = condition.free_symbols
        if not free or not free <= axes.keys():
            continue
        for symbol in free:
            numbers = {s: sympy.Integer(n) for s, n in hints.items() if s != symbol}
            found[symbol].update(_ends(condition.xreplace(numbers), symbol, hints[symbol]))
    if ranges:
        for symbol, sizes in found.items():
            last = getattr(program.range_constraints.get(symbol), "upper", LAST)
            sizes -= {n for n in sizes if n > last}
    return [
        dict.fromkeys(axes[symbol], size)
        for symbol, sizes in found.items()
        for size in sorted(sizes, key=lambda n, near=hints[symbol]: (abs(n - near), n))[:MOST_SIZES]  # type: ignore[misc]
    ]


def too_large(shapes: Iterable[tuple[str, Sequence[int]]], sizes: Mapping[Place, int]) -> bool:
    """Whether inputs of these sizes are too large to run the model on them.

    Args:
        shapes: The shape of each input, by its name.
        sizes: The sizes of some axes.
    """
    changed = [[sizes.get((name, axis), n) for axis, n in enumerate(shape)] for name, shape in shapes]
    return max(sizes.values()) > FARTHEST or sum(map(math.prod, changed)) > NUMBERS


def _ends(condition: Any, symbol: sympy.Symbol, start: int) -> Iterator[int]:
    """Yield the nearest smaller and the nearest larger size at which a condition fails, if they exist."""

    def holds(size: int) -> bool:
        try:
            return condition.xreplace({symbol: sympy.Integer(size)}) is sympy.true
        except ZeroDivisionError:
            return False

    below = next((n for n in range(start - 1, max(start - STEPS, 0), -1) if not holds(n)), None)
    if below is not None:
        yield below
    good = start
    doubled = itertools.takewhile(lambda n: n <= LAST, ((start + STEPS) << k for k in itertools.count()))
    for size in itertools.chain(range(start + 1, start + STEPS), doubled):
        if not holds(size):
            while size - good > 1:
                middle = (good + size) // 2
                good, size = (middle, size) if holds(middle) else (good, middle)
            yield size
            return
        good = size
