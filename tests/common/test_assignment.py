"""The assignment against SciPy's, and against all permutations."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from secateur.common.assignment import best_assignment


@pytest.mark.parametrize("size", [1, 2, 3, 17, 64])
@pytest.mark.parametrize("kind", ["normal", "ties"])
def test_the_sum_is_that_of_scipy(size: int, kind: str) -> None:
    rng = np.random.default_rng(size)
    for _ in range(5):
        values = rng.normal(size=(size, size))
        if kind == "ties":
            values = np.round(values)
        found = best_assignment(values)
        assert sorted(found) == list(range(size))
        rows, columns = linear_sum_assignment(values, maximize=True)
        assert values[np.arange(size), found].sum() == pytest.approx(values[rows, columns].sum(), abs=1e-9)


def test_no_permutation_has_a_larger_sum() -> None:
    values = np.random.default_rng(0).normal(size=(5, 5))
    best = max(permutations(range(5)), key=lambda order: values[np.arange(5), list(order)].sum())
    assert tuple(best_assignment(values)) == best
