"""One ranking of all units, and what makes groups comparable in it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.allocators import LAMP, Budget, Global, Limits
from secateur.allocators.global_ranking import lamp, zscore
from secateur.errors import ScoreError, SettingError
from tests.allocators.fake import FakeGraph, random_scores

WIDE = Limits(max_ratio=1 - 1e-9)


def literal(scores: dict[str, Any], normalise: str, count: int) -> set[tuple[str, int]]:
    """The first `count` of all units, one by one."""
    entries = []
    for place, (name, values) in enumerate(scores.items()):
        for i, s in enumerate(values):
            if normalise == "mean":
                value = s / np.mean(values)
            elif normalise == "max":
                value = s / max(values)
            elif normalise == "zscore":
                value = (s - np.mean(values)) / np.std(values)
            elif normalise == "lamp":
                larger = [v for j, v in enumerate(values) if v > s or (v == s and j < i)] + [s]
                value = s**2 / sum(v**2 for v in larger)
            else:
                value = s
            entries.append((value, -place, -i, name))
    return {(name, -i) for _, _, i, name in sorted(entries)[:count]}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(2, 12), min_size=1, max_size=4),
    st.integers(0, 10**6),
    st.sampled_from(["none", "mean", "max", "zscore", "lamp"]),
    st.integers(0, 19),
)
def test_the_lowest_of_all_go(sizes: list[int], seed: int, normalise: str, twentieths: int) -> None:
    graph: Any = FakeGraph(sizes)
    scores = random_scores(graph, seed, ("magnitude",))
    ratio = twentieths / 20
    plan = Global(ratio, normalise).allocate(graph, scores, limits=WIDE)
    count = int(np.floor(ratio * sum(sizes) + 1e-9))
    expected = literal(scores["magnitude"], normalise, count)
    for group in plan.groups:
        wanted = sorted(i for name, i in expected if name == group.name)
        if len(wanted) < group.size:  # limits leave one
            assert list(group.removed) == wanted
        else:
            assert len(group.removed) == group.size - 1


def test_ties_keep_the_earlier_group_and_the_lower_index() -> None:
    graph: Any = FakeGraph([3, 3])
    scores = {"magnitude": {"layer0": np.ones(3), "layer1": np.ones(3)}}
    plan = Global(4 / 6, "none").allocate(graph, scores, limits=Limits(max_ratio=0.99))
    assert [group.removed for group in plan.groups] == [(2,), (1, 2)]


def test_lamp_by_hand() -> None:
    # 3, 2, 1, 1: 9/9, 4/13, and of the equal ones the lower index is the larger.
    np.testing.assert_allclose(lamp(np.array([1.0, 3.0, 1.0, 2.0])), [1 / 14, 1, 1 / 15, 4 / 13])
    np.testing.assert_array_equal(lamp(np.zeros(3)), 0)
    assert np.isfinite(lamp(np.array([1e200, 1e-200, 1e200]))).all()


def test_zscore_takes_any_sign_and_knows_equal_scores() -> None:
    np.testing.assert_allclose(zscore(np.array([-1.0, 0.0, 4.0])), np.array([-2, -1, 3]) / (14 / 3) ** 0.5)
    np.testing.assert_array_equal(zscore(np.full(7, 0.1)), 0)
    graph: Any = FakeGraph([3, 3])
    scores = {"magnitude": {"layer0": np.array([-9.0, 0, 9]), "layer1": np.array([70.0, 71, 72])}}
    plan = Global(2 / 6, "zscore").allocate(graph, scores)
    assert [group.removed for group in plan.groups] == [(0,), (0,)]


def test_lamp_is_global_with_its_normalisation() -> None:
    graph: Any = FakeGraph([12, 8, 5])
    scores = random_scores(graph, 4)
    a = LAMP().allocate(graph, scores, Budget(params=0.5))
    b = Global(normalise="lamp").allocate(graph, scores, Budget(params=0.5))
    assert a.groups == b.groups
    assert (a.allocator, a.settings["normalise"]) == ("lamp", "lamp")


@pytest.mark.parametrize("normalise", ["none", "mean", "max", "zscore", "lamp"])
def test_a_budget_is_met(normalise: str) -> None:
    graph: Any = FakeGraph([12, 8, 5])
    plan = Global(normalise=normalise).allocate(graph, random_scores(graph, 1), Budget(macs=0.5))
    assert 0.4 * plan.dense.macs < plan.predicted.macs <= 0.5 * plan.dense.macs


def test_a_group_of_zeros_goes_first() -> None:
    graph: Any = FakeGraph([4, 4])
    scores = {"magnitude": {"layer0": np.arange(1.0, 5.0), "layer1": np.zeros(4)}}
    for normalise in ("none", "mean", "max", "lamp"):
        plan = Global(3 / 8, normalise).allocate(graph, scores)
        assert [len(group.removed) for group in plan.groups] == [0, 3]


def test_bad_settings() -> None:
    graph: Any = FakeGraph([4])
    scores = random_scores(graph, 0)
    with pytest.raises(
        SettingError, match="expected normalise to be one of none, mean, max, zscore, lamp, got 'l3'"
    ):
        Global(normalise="l3")
    with pytest.raises(SettingError, match=r"LAMP: expected ratio in \[0, 1\), got 1.5"):
        LAMP(1.5)
    with pytest.raises(SettingError, match="Global: expected either a ratio or a budget, got neither"):
        Global().allocate(graph, scores)
    with pytest.raises(SettingError, match="LAMP: expected either a ratio or a budget, got both"):
        LAMP(0.5).allocate(graph, scores, Budget(macs=0.5))
    negative = {"magnitude": {"layer0": np.array([1.0, -1.0, 2.0, 3.0])}}
    with pytest.raises(ScoreError, match=r"expected scores of 0 or more to divide, got -1\.0 in 'layer0'"):
        Global(0.5).allocate(graph, negative)
    assert Global(0.5, "none").allocate(graph, negative).groups[0].removed == (0, 1)
