"""A search over smooth changes along the depth of a network: propose points, and use the error of each.

A point is one number for each group, in order of execution. Wave k is a cosine with k half periods over the
depth of the network (the discrete cosine transform): wave 1 moves budget between the first groups and the
last ones, wave 2 between those in the middle and the rest, the last waves between neighbours. All waves
together can make any point, up to a constant for all groups, which changes nothing at a given budget. The
first waves alone make points that are smooth over depth, so a search over many groups starts with these.
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
"""Steps along a wave become at most this many times longer if the error does not change."""

LEAST = 0.08
"""The search ends when steps are shorter than this."""

GAIN = 0.005
"""A round that lowers the error by a smaller fraction than this halves the step."""


def waves(size: int) -> NDArray[np.float64]:
    """All waves over `size` groups, the longest first. They are orthogonal. [size - 1, size]

    Example:
        >>> waves(2).round(3).tolist()
        [[1.0, -1.0]]
    """
    number = np.arange(1, size)[:, None]
    place = (np.arange(size)[None] + 0.5) / size
    return math.sqrt(2) * np.cos(math.pi * number * place)


def neighbours(size: int, together: int, error: float) -> Generator[tuple[str, Vector], float, None]:
    """Propose points one after another. Each depends on the errors of those before.

    In each round the current point moves up and down along several waves. A parabola through the three
    errors of a wave gives the best step along it. Then all these steps are taken together, in full, by half
    and by a quarter. The best point of the round is the next current point. If the round gained little, steps
    become shorter. If both errors of a wave equal the error in the middle, the plan probably did not change;
    the wave is then tried again with a step twice as long.

    Args:
        size: Number of groups.
        together: Number of waves in a round. The next round takes the next waves; after the last wave comes
            the first one again.
        error: The error at the start, which is all zeros.

    Yields:
        A name for the point, and the point [size]. Send its error; infinity if it has none.
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
    """Return the minimum of the parabola through three errors, at most one step away.

    If there is no minimum, or an error is not finite, return one step towards the smaller error.

    Args:
        step: Distance of the outer points from the middle.
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
