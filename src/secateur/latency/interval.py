"""How sure a ratio of two latencies is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """A figure with its confidence interval.

    Attributes:
        value: The figure.
        low: Lower end.
        high: Upper end.
    """

    value: float
    low: float
    high: float

    def __contains__(self, number: float) -> bool:
        """Whether `number` is a value that the measurement leaves possible."""
        return self.low <= number <= self.high


def median_ratio(
    above: Sequence[float], below: Sequence[float], *, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """The ratio of two medians that were measured in the same rounds, with its bootstrap interval.

    Rounds are drawn anew in pairs, since what slows the machine slows both of a round, and in blocks of
    neighbours (of the cube root of their number, around the end), since it does so for a while.
    Source: Politis and Romano 1992, A circular block-resampling procedure for stationary data.

    Args:
        above: Seconds of each round. [rounds]
        below: Seconds of the same rounds. [rounds]
        confidence: How often such an interval holds the true ratio, in (0, 1).
        seed: Of the draws.

    Returns:
        median(above) / median(below), and the percentiles of the same over the draws.
    """
    first, second = np.asarray(above, dtype=np.float64), np.asarray(below, dtype=np.float64)
    drawn = block_draws(len(first), RESAMPLES, np.random.default_rng(seed))
    ratios = np.median(first[drawn], axis=1) / np.median(second[drawn], axis=1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(ratios, [tail, 1 - tail])
    return Interval(float(np.median(first) / np.median(second)), float(low), float(high))


def block_draws(rounds: int, resamples: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """Rounds drawn with repetition, in blocks of neighbours. [resamples, rounds]"""
    length = max(1, round(rounds ** (1 / 3)))
    starts = generator.integers(rounds, size=(resamples, -(-rounds // length)))
    blocks = (starts[:, :, None] + np.arange(length)) % rounds
    return blocks.reshape(resamples, -1)[:, :rounds]
