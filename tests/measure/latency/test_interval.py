from __future__ import annotations

import statistics

import numpy as np
import pytest

from secateur.measure.latency.interval import RESAMPLES, Interval, block_draws, median_ratio


def literal(above: list[float], below: list[float], confidence: float, seed: int) -> tuple[float, float]:
    """The circular block bootstrap as its paper writes it: blocks laid end to end, one resample at a time."""
    n = len(above)
    length = max(1, round(n ** (1 / 3)))
    count = -(-n // length)
    starts = np.random.default_rng(seed).integers(n, size=(RESAMPLES, count))
    ratios = []
    for resample in starts:
        rounds: list[int] = []
        for start in resample:
            for step in range(length):
                rounds.append((int(start) + step) % n)
        rounds = rounds[:n]
        ratios.append(
            statistics.median(above[r] for r in rounds) / statistics.median(below[r] for r in rounds)
        )
    tail = (1 - confidence) / 2
    return float(np.quantile(ratios, tail)), float(np.quantile(ratios, 1 - tail))


@pytest.mark.parametrize(("rounds", "confidence"), [(5, 0.9), (17, 0.95)])
def test_against_the_literal_bootstrap(rounds: int, confidence: float) -> None:
    generator = np.random.default_rng(rounds)
    above, below = (
        generator.lognormal(0.5, 0.3, rounds).tolist(),
        generator.lognormal(0, 0.3, rounds).tolist(),
    )
    found = median_ratio(above, below, confidence=confidence, seed=4)
    assert found.value == statistics.median(above) / statistics.median(below)
    assert (found.low, found.high) == pytest.approx(literal(above, below, confidence, 4), abs=1e-12)


def test_blocks_are_neighbours_around_the_end() -> None:
    drawn = block_draws(27, 50, np.random.default_rng(0))
    assert drawn.shape == (50, 27)
    assert set(drawn.ravel()) <= set(range(27))
    steps = np.diff(drawn.reshape(50, 9, 3), axis=2) % 27
    assert (steps == 1).all()
    assert block_draws(5, 3, np.random.default_rng(0)).shape == (3, 5)


def test_it_holds_the_true_ratio_as_often_as_it_says() -> None:
    generator, held, runs = np.random.default_rng(7), 0, 200
    for seed in range(runs):
        pace = np.exp(0.2 * generator.standard_normal(30))  # what slows the machine slows both
        above = 1.3 * pace * np.exp(0.05 * generator.standard_normal(30))
        below = pace * np.exp(0.05 * generator.standard_normal(30))
        held += 1.3 in median_ratio(above, below, confidence=0.9, seed=seed)
    assert 0.82 <= held / runs <= 0.99


def test_what_does_not_vary_is_certain() -> None:
    assert median_ratio([3.0] * 6, [2.0] * 6) == Interval(1.5, 1.5, 1.5)
    assert 1.5 in Interval(1.4, 1.2, 1.5)
    assert 1.51 not in Interval(1.4, 1.2, 1.5)
