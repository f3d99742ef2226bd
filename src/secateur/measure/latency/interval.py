"""Confidence intervals for the ratio of two latencies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """A number with its confidence interval.

    Attributes:
        value: The number.
        low: Lower end.
        high: Upper end.
    """

    value: float
    low: float
    high: float

    def __contains__(self, number: float) -> bool:
        """Whether `number` lies inside the interval, ends included."""
        return self.low <= number <= self.high


def median_ratio(
    above: Sequence[float], below: Sequence[float], *, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """Return median(above) / median(below) with its bootstrap interval.

    Both were measured in the same rounds. The bootstrap resamples whole rounds, because a busy machine
    slows both passes of a round. It resamples blocks of neighbouring rounds, because a machine stays busy
    for some time. A block has about ``rounds ** (1/3)`` rounds and wraps around at the end.
    Source: Politis and Romano 1992, A circular block-resampling procedure for stationary data.

    Args:
        above: Seconds of the numerator in each round. [rounds]
        below: Seconds of the denominator in the same rounds. [rounds]
        confidence: The share of such intervals that contain the true ratio, in (0, 1).
        seed: Seed of the bootstrap.

    Returns:
        The ratio, with percentiles of the ratio over the resamples as its ends.
    """
    first, second = np.asarray(above, dtype=np.float64), np.asarray(below, dtype=np.float64)
    drawn = block_draws(len(first), RESAMPLES, np.random.default_rng(seed))
    ratios = np.median(first[drawn], axis=1) / np.median(second[drawn], axis=1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(ratios, [tail, 1 - tail])
    return Interval(float(np.median(first) / np.median(second)), float(low), float(high))


def block_draws(rounds: int, resamples: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """Draw indices of rounds with repetition, in blocks of neighbouring rounds. [resamples, rounds]"""
    length = max(1, round(rounds ** (1 / 3)))
    starts = generator.integers(rounds, size=(resamples, -(-rounds // length)))
    blocks = (starts[:, :, None] + np.arange(length)) % rounds
    return blocks.reshape(resamples, -1)[:, :rounds]
