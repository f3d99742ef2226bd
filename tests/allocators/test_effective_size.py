"""How many scores matter."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateur.allocators.effective_size import effective_number, effective_size
from secateur.errors import ScoreError, SettingError

RNG = np.random.default_rng(0)


def literal(scores: list[int], beta: Fraction) -> int:
    """As the paper writes it, in exact arithmetic."""
    if not any(scores):
        scores = [1] * len(scores)
    omega = [Fraction(abs(s), sum(map(abs, scores))) for s in scores]
    return min(len(scores), max(1, math.floor(beta / sum(w * w for w in omega))))


@given(st.lists(st.integers(-50, 50), min_size=1, max_size=40), st.integers(1, 40))
def test_equals_exact_arithmetic(scores: list[int], quarters: int) -> None:
    expected = literal(scores, Fraction(quarters, 10))
    assert effective_size(scores, quarters / 10) == expected
    assert effective_size(torch.tensor(scores), quarters / 10) == expected


@pytest.mark.parametrize("size", [1, 3, 7, 100, 100_003])
@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, -7e-3, 1e308, 5e-324])
def test_equal_scores_keep_all(size: int, value: float) -> None:
    assert effective_size(np.full(size, value)) == size
    assert effective_size(torch.full((size,), value, dtype=torch.float64)) == size
    assert effective_size(np.full(size, value), beta=3) == size


def test_equal_but_for_rounding_keep_all() -> None:
    assert effective_size(np.array([0.3, 0.1 + 0.2, 0.3, 0.3])) == 4
    assert effective_size(np.ones(100), beta=0.29) == 29  # 0.29 * 100 is below 29


def test_one_score_alone_keeps_one() -> None:
    scores = np.zeros(50)
    scores[7] = -3.0
    assert effective_size(scores) == 1
    assert effective_size(scores, beta=0.01) == 1  # at least one


def test_gaussian_scores_have_two_over_pi() -> None:
    share = effective_number(RNG.standard_normal(200_000)) / 200_000
    assert share == pytest.approx(2 / math.pi, abs=0.003)


@given(st.integers(0, 10**6), st.floats(1e-200, 1e200))
def test_order_and_scale_do_not_matter(seed: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.lognormal(0, 2, 30)
    assert effective_number(rng.permutation(scores) * -scale) == pytest.approx(effective_number(scores))


def test_along_an_axis() -> None:
    scores = RNG.standard_normal((4, 5, 6))
    for dim in (0, 1, 2, -1):
        rows = np.moveaxis(scores, dim, -1).reshape(-1, scores.shape[dim])
        expected = np.array([effective_size(row, 0.7) for row in rows])
        expected = expected.reshape([n for k, n in enumerate(scores.shape) if k != dim % 3])
        found = effective_size(scores, 0.7, dim=dim)
        assert found.dtype == np.int64
        np.testing.assert_array_equal(found, expected)
        tensor = effective_size(torch.from_numpy(scores), 0.7, dim=dim)
        assert tensor.dtype == torch.int64
        np.testing.assert_array_equal(tensor.numpy(), expected)
    assert effective_size(np.array([[0.0, 0.0], [1.0, 0.0]]), dim=1).tolist() == [2, 1]


@pytest.mark.parametrize("make", [np.asarray, torch.tensor])
@pytest.mark.parametrize(
    ("scores", "says"),
    [
        ([1.0, math.nan], "expected finite scores"),
        ([math.inf, 1.0], "expected finite scores"),
        ([], "expected at least one score, got shape"),
        ([1 + 1j], "expected real numbers, got"),
    ],
)
def test_scores_that_are_none(make: Any, scores: list[Any], says: str) -> None:
    with pytest.raises(ScoreError, match=says):
        effective_size(make(scores))


def test_other_bad_input() -> None:
    with pytest.raises(ScoreError, match="expected dim to be an axis of shape"):
        effective_size(np.ones((2, 3)), dim=2)
    with pytest.raises(ScoreError, match="expected at least one score"):
        effective_size(np.ones((2, 0)), dim=1)
    with pytest.raises(ScoreError, match="expected an array of numbers"):
        effective_size([[1.0], [1.0, 2.0]])
    with pytest.raises(ScoreError, match="expected real numbers, got <U1"):
        effective_size(["a"])
    bad: Any
    for bad in (0, -1, math.nan, math.inf, "1", True, None):
        with pytest.raises(SettingError, match="effective_size: expected beta to be a number above 0"):
            effective_size([1.0], beta=bad)
    assert effective_size(np.ones((0, 3)), dim=1).shape == (0,)  # no rows, nothing to keep


def test_the_scores_stay_as_they_are() -> None:
    scores = torch.tensor([-1.0, 2.0], requires_grad=True)
    effective_size(scores)
    assert scores.tolist() == [-1.0, 2.0]
    assert scores.grad is None
