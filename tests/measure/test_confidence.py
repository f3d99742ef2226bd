"""Confidence bounds for the mean of paired differences hold as often as they say."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from secateur.measure.confidence import LEAST, interval, samples_for, samples_needed, upper_bound

Row = NDArray[np.float64]


def differences(worse: int, better: int, samples: int) -> Row:
    return np.array([1.0] * worse + [-1.0] * better + [0.0] * (samples - worse - better))


def too_low(samples: int, worse: float, better: float, confidence: float = 0.95) -> float:
    """The probability that the bound is below the true mean, over all outcomes: not drawn, but added up."""
    total = 0.0
    for w, b in product(range(samples + 1), repeat=2):
        chance = 0.0
        if w + b <= samples:
            shares = [worse, better, 1 - worse - better]
            chance = float(stats.multinomial.pmf([w, b, samples - w - b], samples, shares))
        if chance > 1e-7 and upper_bound(differences(w, b, samples), confidence) < worse - better:
            total += chance
    return total


@pytest.mark.parametrize(
    ("samples", "worse", "better"),
    [(20, 0.15, 0.0), (20, 0.2, 0.05), (30, 0.1, 0.1), (40, 0.06, 0.02), (40, 0.3, 0.25)],
)
def test_the_bound_is_too_low_as_seldom_as_it_says(samples: int, worse: float, better: float) -> None:
    assert too_low(samples, worse, better) <= 0.055


def test_without_gains_it_is_that_of_clopper_and_pearson() -> None:
    for worse, samples in ((0, 50), (1, 50), (7, 300), (30, 1000)):
        exact = stats.beta.ppf(0.95, worse + 1, samples - worse)
        assert upper_bound(differences(worse, 0, samples)) == pytest.approx(exact, abs=1e-9)
    assert upper_bound(differences(0, 0, 299)) <= 0.01 < upper_bound(differences(0, 0, 298))


def test_with_many_samples_it_is_the_normal_one() -> None:
    found = differences(160, 80, 4000)
    normal = found.mean() + 1.645 * found.std() / math.sqrt(4000)
    assert upper_bound(found) == pytest.approx(normal, rel=0.02)
    low, high = interval(found)
    assert low == pytest.approx(found.mean() - 1.96 * found.std() / math.sqrt(4000), rel=0.03)
    assert high == pytest.approx(found.mean() + 1.96 * found.std() / math.sqrt(4000), rel=0.03)


def test_gains_are_losses_seen_from_the_other_side() -> None:
    found = differences(3, 9, 100)
    low, high = interval(found)
    assert interval(-found) == pytest.approx((-high, -low))
    assert low < found.mean() < high
    assert -1 <= low
    assert upper_bound(differences(0, 10, 10)) < -0.4


def test_bounds_of_any_numbers_hold_by_simulation() -> None:
    generator = np.random.default_rng(0)
    draws = {
        "skewed": (generator.exponential(size=(1500, 100)), 1.0),
        "normal": (generator.normal(size=(1500, 60)), 0.0),
        "rare": (generator.binomial(1, 0.04, size=(1500, 300)) * 0.37, 0.04 * 0.37),
    }
    for name, (values, mean) in draws.items():
        missed = np.mean([upper_bound(row) < mean for row in values])
        assert missed <= (0.07 if name == "skewed" else 0.055), name


def test_what_has_no_bound() -> None:
    assert upper_bound(np.array([0.5] * (LEAST - 1))) == math.inf
    assert upper_bound(np.array([1.0, math.nan, 0.0])) == math.inf
    assert upper_bound(np.zeros(0)) == math.inf
    same = np.full(100, 0.25)
    assert 0.25 < upper_bound(same) < 0.26


@pytest.mark.parametrize(("drop", "confidence"), [(0.01, 0.95), (0.03, 0.95), (0.05, 0.9)])
def test_samples_needed_are_the_fewest(drop: float, confidence: float) -> None:
    needed = samples_needed(drop, confidence)
    assert upper_bound(np.zeros(needed), confidence) <= drop < upper_bound(np.zeros(needed - 1), confidence)


def test_samples_for_a_limit() -> None:
    found = differences(10, 6, 1000)
    about = samples_for(found, 0.01, 0.95)
    scale = round(about / 1000 + 0.5)
    assert upper_bound(np.tile(found, scale)) <= 0.01
    assert samples_for(found, 0.004, 0.95) == math.inf
