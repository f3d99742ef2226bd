"""Points along waves over depth, and what is learnt from their errors."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from secateur.pipeline.auto.waves import Vector, best_step, neighbours, waves


def run(size: int, together: int, error: Callable[[Vector], float]) -> tuple[list[str], list[Vector]]:
    """All proposals for a function, by name and as points."""
    proposals = neighbours(size, together, error(np.zeros(size)))
    names, points = [], []
    try:
        name, point = next(proposals)
        while len(names) < 1000:
            names.append(name)
            points.append(point)
            name, point = proposals.send(error(point))
    except StopIteration:
        pass
    return names, points


def test_waves_are_orthogonal_and_sum_to_zero() -> None:
    found = waves(7)
    np.testing.assert_allclose(found @ found.T, 7 * np.eye(6), atol=1e-12)
    np.testing.assert_allclose(found.sum(1), 0, atol=1e-12)
    assert np.all(np.diff(found[0]) < 0)  # from the first group to the last
    assert waves(1).shape == (0, 1)


def test_a_bowl_is_searched_to_its_bottom_and_then_the_search_ends() -> None:
    bottom = np.array([0.9, -0.4, 0.3, -0.8])
    names, points = run(4, 8, lambda p: 1 + float(np.square(p - bottom).sum()))
    assert names[:3] == ["round 1, wave 1 up", "round 1, wave 1 down", "round 1, wave 2 up"]
    assert names[6] == "round 1, all waves x 1"
    best = min(points, key=lambda p: float(np.square(p - bottom).sum()))
    np.testing.assert_allclose(best, bottom, atol=1e-9)
    assert len(names) < 60


def test_a_few_waves_at_a_time_come_round_to_all() -> None:
    names, _ = run(6, 2, lambda p: 1 + float(np.square(p).sum()))
    tried = {name.split()[3] for name in names if "all" not in name}
    assert tried == {"1", "2", "3", "4", "5"}
    assert [name.split(",")[1] for name in names if name.startswith("round 3,")][:4] == [
        " wave 5 up", " wave 5 down", " wave 1 up", " wave 1 down",
    ]  # fmt: skip


def test_where_nothing_changes_steps_get_longer() -> None:
    """The error falls at 3 and -4 along one of the waves, far beyond the first step."""
    names, points = run(2, 8, lambda p: 1.0 if -4 < p[0] < 3 else 0.5)
    along = [float(p[0]) for p in points[:6]]
    np.testing.assert_allclose(along, [0.7, -0.7, 1.4, -1.4, 2.8, -2.8])
    assert any(p[0] >= 3 for p in points[6:8])
    names, points = run(2, 8, lambda p: 1.0)
    assert max(float(p[0]) for p in points) == pytest.approx(16 * 0.7)
    assert len(names) < 60


def test_points_without_an_error_are_avoided() -> None:
    def error(point: Vector) -> float:
        return math.inf if point[0] > 0 else 1 + point[0]

    _, points = run(3, 8, error)
    finite = [error(p) for p in points if math.isfinite(error(p))]
    assert min(finite) < 0
    assert next(neighbours(1, 8, 1.0), None) is None


@pytest.mark.parametrize(
    ("errors", "expected"),
    [
        ((2.0, 1.0, 2.0), 0.0),
        ((5.0, 1.0, 1.0), 0.5),  # a parabola whose lowest point is half a step up
        ((1.0, 3.0, 2.0), -1.0),  # bent downwards: the better side
        ((9.0, 5.0, 2.0), 1.0),  # beyond the step
        ((math.inf, 1.0, 2.0), 1.0),
        ((1.0, 1.0, 1.0), 0.0),
    ],
)
def test_the_best_step_along_a_wave(errors: tuple[float, float, float], expected: float) -> None:
    assert best_step(1.0, *errors) == pytest.approx(expected)
