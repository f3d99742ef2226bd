"""Propose neighbours of a point along waves over depth, and learn from the error of each.

A point is one number for each group, in order of execution. Wave k is a cosine with k half periods over the
depth of the network (the discrete cosine transform): wave 1 moves budget between the first groups and the
last ones, wave 2 between those in the middle and the rest, the last waves between neighbours. All waves
together reach every point, up to a constant for all groups, which changes nothing at a given budget. Few of
them reach what is smooth over depth, so a search over many groups starts with these.
"""

from __future__ import annotations

import math
from collections.abc import Generator

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]

STEP = 0.7
"""The first step along a wave: its largest number is this times the square root of 2."""

FARTHEST = 16
"""Steps along a wave get at most this many times longer where nothing changes."""

LEAST = 0.08
"""The search ends when steps are shorter than this."""

GAIN = 0.005
"""A round that lowers the error by a smaller fraction than this halves the step."""


def waves(size: int) -> NDArray[np.float64]:
    """All waves over so many groups, the longest first. They are orthogonal. [size - 1, size]

    Example:
        >>> waves(2).round(3).tolist()
        [[1.0, -1.0]]
    """
    number = np.arange(1, size)[:, None]
    place = (np.arange(size)[None] + 0.5) / size
    return math.sqrt(2) * np.cos(math.pi * number * place)


def neighbours(size: int, together: int, error: float) -> Generator[tuple[str, Vector], float, None]:
    """Propose points one after another, each with the knowledge of the errors of those before.

    In each round the current point moves up and down along several waves. A parabola through the three
    errors of a wave gives the best step along it. Then all these steps are taken together, in full, by half
    and by a quarter. The best point of the round is the next current point. If the round gained little, steps
    get shorter. A wave along which both errors equal that in the middle, as where the plan is the same, is
    tried with steps twice as long, and again.

    Args:
        size: Number of groups.
        together: Number of waves in a round. The next round takes the next ones, and after the last the
            first again.
        error: The error at the start, which is all zeros.

    Yields:
        What the point is, in words, and the point [size]. Send its error; infinity if it has none.
    """
    every = waves(size)
    reach = np.ones(len(every))
    centre, step, round_, first = np.zeros(size), STEP, 0, 0
    while len(every) and step > LEAST:
        round_ += 1
        best, best_error = centre, error
        moved = np.zeros(size)
        for number in (first + np.arange(min(together, len(every)))) % len(every):
            while True:
                along = reach[number] * step * every[number]
                up = yield f"round {round_}, wave {number + 1} up", centre + along
                down = yield f"round {round_}, wave {number + 1} down", centre - along
                if not up == down == error or reach[number] >= FARTHEST:
                    break
                reach[number] *= 2
            for sign, found in ((1, up), (-1, down)):
                if found < best_error:
                    best, best_error = centre + sign * along, found
            moved += best_step(1.0, down, error, up) * along
        for part in (1.0, 0.5, 0.25):
            point = centre + part * moved
            found_error = yield f"round {round_}, all waves x {part:g}", point
            if found_error < best_error:
                best, best_error = point, found_error
        if not best_error < (1 - GAIN) * error:
            step /= 2
        centre, error, first = best, best_error, (first + together) % len(every)


def best_step(step: float, below: float, here: float, above: float) -> float:
    """Where the parabola through three errors is lowest, at most one step away.

    Where it has no minimum, or an error is not finite, the better side.

    Args:
        step: How far the outer points are away.
        below: The error one step down.
        here: The error in the middle.
        above: The error one step up.

    Example:
        >>> best_step(1.0, 4.0, 1.0, 0.0)
        1.0
        >>> best_step(1.0, 1.5, 1.0, 1.0)
        0.5
    """
    bend = above + below - 2 * here
    if math.isfinite(bend) and bend > 0:
        return min(max(step * (below - above) / (2 * bend), -step), step)
    return step if above < below else -step if below < above else 0.0
