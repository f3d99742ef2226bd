from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.allocators import Budget, Limits, Uniform
from secateur.errors import SettingError
from tests.allocators.fake import FakeGraph, random_scores, reference_order


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(0, 98), st.booleans(), st.integers(0, 9)
)
def test_every_group_loses_the_floor_of_its_share_from_the_bottom(
    sizes: list[int], percent: int, ties: bool, seed: int
) -> None:
    graph = FakeGraph(sizes)
    scores = random_scores(graph, seed, ties=ties)
    plan = Uniform(ratio=percent / 100).allocate(graph, scores)  # type: ignore[arg-type]
    for group in plan.groups:
        k = int(Fraction(percent, 100) * group.size)
        order = reference_order(scores["magnitude"][group.name])
        assert group.removed == tuple(sorted(order[:k]))


def test_a_quarter() -> None:
    graph = FakeGraph([8, 20, 5])
    plan = Uniform(ratio=0.25).allocate(graph, random_scores(graph, 1))  # type: ignore[arg-type]
    assert plan.ratios == {"layer0": 0.25, "layer1": 0.25, "layer2": 0.2}
    assert plan.settings["ratio"] == 0.25
    assert plan.settings["removal"] == "magnitude"


def test_equal_scores_lose_the_last_units() -> None:
    scores = {"magnitude": {"layer0": np.ones(8)}}
    assert Uniform(0.25).allocate(FakeGraph([8]), scores).groups[0].removed == (6, 7)  # type: ignore[arg-type]


def test_rounded_within_limits() -> None:
    graph = FakeGraph([64, 20, 7])
    plan = Uniform(0.3).allocate(graph, random_scores(graph, 1), limits=Limits(round_to=8))  # type: ignore[arg-type]
    assert [g.kept for g in plan.groups] == [48, 16, 7]


def test_another_signal() -> None:
    graph = FakeGraph([8])
    scores = random_scores(graph, 2)
    rule = Uniform(0.25, removal="taylor")
    assert rule.signals == ("taylor",)
    assert (
        rule.allocate(graph, scores).groups[0].removed
        == tuple(  # type: ignore[arg-type]
            sorted(reference_order(scores["taylor"]["layer0"])[:2])
        )
    )


def test_either_a_ratio_or_a_budget() -> None:
    graph: Any = FakeGraph([8])
    scores = random_scores(graph, 2)
    with pytest.raises(SettingError, match="Uniform: expected either a ratio or a budget, got neither"):
        Uniform().allocate(graph, scores)
    with pytest.raises(SettingError, match="Uniform: expected either a ratio or a budget, got both"):
        Uniform(0.25).allocate(graph, scores, budget=Budget(macs=0.5))


@pytest.mark.parametrize("ratio", [-0.25, 1, 1.0, float("nan"), True, "0.25"])
def test_ratio_out_of_range(ratio: Any) -> None:
    with pytest.raises(SettingError, match=r"Uniform: expected ratio in \[0, 1\), got "):
        Uniform(ratio)
