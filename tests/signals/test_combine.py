from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import rankdata

from secateur.signals.combine import combined


@pytest.mark.parametrize("how", ["sum", "mean", "max"])
@given(st.lists(st.tuples(st.floats(-5, 5), st.integers(0, 4)), max_size=12), st.integers(0, 12))
def test_equals_loops_however_members_are_cut_into_parts(how, members, cut) -> None:
    score, unit = (np.array([m[k] for m in members], dtype=t) for k, t in ((0, np.float64), (1, np.int64)))
    found = combined([score[:cut], score[cut:]], [unit[:cut], unit[cut:]], 5, how)
    rule = {"sum": sum, "mean": np.mean, "max": max}[how]
    expected = [rule(of) if (of := [s for s, u in members if u == j]) else 0.0 for j in range(5)]
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_sum_and_mean_rank_units_with_the_same_members_alike_but_max_need_not() -> None:
    scores, units = [np.array([1.0, 5.0, 2.0]), np.array([6.0, 1.5, 4.9])], [np.arange(3)] * 2
    ranks = {how: rankdata(combined(scores, units, 3, how)).tolist() for how in ("sum", "mean", "max")}
    assert ranks["sum"] == ranks["mean"] != ranks["max"]
