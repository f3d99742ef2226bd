from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from secateur.signals.diameter import diameters

module = sys.modules[diameters.__module__]
COUNT = 300


def literal(points: Tensor) -> list[float]:
    """Every pair of every set, one after the other."""
    return [max(float(np.abs(a - b).sum()) for a, b in combinations(each.numpy(), 2)) for each in points]


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _class_means() -> Tensor:
    """Classes that differ by a level and by noise, as quantiles of what a convolution gives do."""
    return _random(COUNT, 1) + 0.3 * _random(COUNT, 40, seed=1)


def _heavy_tailed() -> Tensor:
    return _random(COUNT, 1).mul(1.5).exp() * _random(COUNT, 40, seed=1).relu()


def _clusters() -> Tensor:
    """Two far ends and a middle, so that the mean says nothing about most points."""
    ends = torch.tensor([-5.0, 0.0, 5.0], dtype=torch.float64)[torch.arange(COUNT) % 3]
    return ends[:, None] + 0.1 * _random(COUNT, 40)


def _line() -> Tensor:
    """Every triangle inequality is an equality."""
    return _random(COUNT, 1) * torch.ones(40, dtype=torch.float64)


def _equidistant() -> Tensor:
    """No pair can be skipped."""
    return torch.eye(COUNT, dtype=torch.float64)


def _one_pair_is_farther() -> Tensor:
    """Equidistant but for the last two in the order of visits, by less than a bound can tell."""
    points = torch.eye(COUNT, dtype=torch.float64)
    points[7, 11], points[11, 7] = -1e-9, -1e-9
    return points


def _mostly_equal() -> Tensor:
    points = torch.zeros(COUNT, 3, dtype=torch.float64)
    points[200] = torch.tensor([1.0, -2.0, 4.0])
    return points


SETS = [
    _class_means,
    _heavy_tailed,
    _clusters,
    _line,
    _equidistant,
    _one_pair_is_farther,
    _mostly_equal,
    lambda: torch.zeros(COUNT, 2, dtype=torch.float64),
    lambda: _random(COUNT, 30),
    lambda: _random(COUNT, 30) * 1e-3 + 1e6,
]


@pytest.mark.parametrize("number", range(len(SETS)))
def test_equals_all_pairs(number: int) -> None:
    points = torch.stack([SETS[number](), SETS[number]().flip(0)])
    np.testing.assert_allclose(diameters(points), literal(points), rtol=1e-12)


@given(
    count=st.integers(1, 9),
    coordinates=st.integers(1, 4),
    seed=st.integers(0, 99),
    grid=st.booleans(),
    block=st.integers(1, 4),
)
@settings(max_examples=60)
def test_equals_all_pairs_of_anything(
    count: int, coordinates: int, seed: int, grid: bool, block: int
) -> None:
    points = _random(2, count, coordinates, seed=seed)
    points = points.round() if grid else points.exp()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_FEW", 0)
        patch.setattr(module, "_BLOCK", block)
        found = diameters(points)
    expected = literal(points) if count > 1 else [0.0, 0.0]
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-15)


@pytest.fixture
def visited(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many distances were computed, call by call."""
    numbers: list[int] = []
    original = torch.cdist

    def counting(a: Tensor, b: Tensor, p: float) -> Tensor:
        found = original(a, b, p=p)
        numbers.append(found.numel())
        return found

    monkeypatch.setattr(torch, "cdist", counting)
    return numbers


@pytest.mark.parametrize(
    ("points", "share"), [(_class_means, 0.1), (_heavy_tailed, 0.05), (_clusters, 0.6), (_equidistant, 1.3)]
)
def test_pairs_that_cannot_win_are_skipped(points: object, share: float, visited: list[int]) -> None:
    """Of COUNT · (COUNT − 1) / 2; the anchors alone are 5 · COUNT, and a block holds some pairs twice."""
    assert callable(points)
    diameters(points()[None])
    assert sum(visited) <= share * COUNT * (COUNT - 1) / 2


def test_few_points_are_compared_all_at_once(visited: list[int]) -> None:
    diameters(_random(3, 10, 4))
    assert visited == [3 * 10 * 10]
