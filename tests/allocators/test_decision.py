"""Spending a budget to the last unit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.allocators import Budget, Limits, ToD, Uniform
from secateur.errors import BudgetError
from secateur.measure.cost import Cost
from tests.allocators.fake import FakeGraph, random_scores, reference_order

RULES: dict[str, Any] = {"tod": ToD(), "uniform": Uniform()}


def cost(graph: FakeGraph, scores: Any, signal: str, removed: Mapping[str, int]) -> Cost:
    keep = {}
    for group in graph.groups:
        keep[group.name] = np.ones(group.size, dtype=bool)
        keep[group.name][reference_order(scores[signal][group.name])[: removed[group.name]]] = False
    return graph.cost(keep)


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(2, 12), min_size=1, max_size=4),
    seed=st.integers(0, 10**6),
    percent=st.integers(20, 98),
    by_params=st.booleans(),
    round_to=st.integers(1, 3),
)
def test_units_come_back_until_none_fits(
    rule: str, sizes: list[int], seed: int, percent: int, by_params: bool, round_to: int
) -> None:
    graph: Any = FakeGraph(sizes)
    scores, limits = random_scores(graph, seed), Limits(round_to=round_to)
    asked = {"params" if by_params else "macs": percent / 100}
    try:
        knob = RULES[rule].allocate(graph, scores, Budget(**asked, spend=False), limits)
    except BudgetError:
        with pytest.raises(BudgetError, match="smallest"):
            RULES[rule].allocate(graph, scores, Budget(**asked), limits)
        return
    plan = RULES[rule].allocate(graph, scores, Budget(**asked), limits)
    budget, dense = Budget(**asked), graph.cost()
    signal = "wasserstein" if rule == "tod" else "magnitude"
    removed = {g.name: len(g.removed) for g in plan.groups}
    assert cost(graph, scores, signal, removed).macs == plan.predicted.macs  # the first of the order go
    assert budget.met(plan.predicted, dense)
    assert plan.settings == knob.settings
    for group, before in zip(plan.groups, knob.groups, strict=True):
        assert set(group.removed) <= set(before.removed)
        feasible = [0, *limits.feasible(group.size).tolist()]
        assert len(group.removed) in feasible
        if group.removed:
            fewer = max(k for k in feasible if k < len(group.removed))
            assert not budget.met(cost(graph, scores, signal, removed | {group.name: fewer}), dense)


def test_the_last_to_go_come_back_first() -> None:
    graph: Any = FakeGraph([10, 10], repeat=1, area=1)
    scores = {"magnitude": {"layer0": np.arange(10.0), "layer1": np.arange(10.0)}}

    # With a and b kept 3a + ab + 10b MACs: 7 and 7 are 140, 8 and 8 are 168; one more in the first group
    # alone costs 10 more, in the second 17.
    def kept(macs: int, spend: bool) -> list[int]:
        return [g.kept for g in Uniform().allocate(graph, scores, Budget(macs=macs, spend=spend)).groups]

    assert kept(159, False) == kept(149, False) == [7, 7]
    assert kept(149, True) == [7, 7]
    # Equal shares: the earlier group is first. Then the second costs 18 more, the first 10.
    assert kept(150, True) == kept(159, True) == [8, 7]
    # A unit that does not fit does not stop the other group's.
    assert kept(160, True) == [9, 7]
    assert kept(168, True) == [8, 8]


@pytest.mark.parametrize("macs", [0.5, 0.6, 0.75])
def test_what_went_at_one_value_of_the_knob_comes_back_evenly(macs: float) -> None:
    graph: Any = FakeGraph([80, 40, 20])
    alike = {f"layer{i}": np.arange(float(size)) for i, size in enumerate(graph.sizes)}
    # Signals that rank alike: a tolerance of 0 takes half of each group at once.
    rule, scores = ToD(removal="a", protection="b"), {"a": alike, "b": alike}
    alone = rule.allocate(graph, scores, Budget(macs=macs, spend=False))
    assert alone.ratios == {"layer0": 0.5, "layer1": 0.5, "layer2": 0.5}
    plan = rule.allocate(graph, scores, Budget(macs=macs))
    ratios = [plan.ratios[name] for name in alike]
    assert max(ratios) - min(ratios) <= 0.1
    assert plan.dense.macs * (macs - 0.02) < plan.predicted.macs <= plan.dense.macs * macs


def test_a_budget_that_is_not_spent_is_written_down() -> None:
    graph: Any = FakeGraph([10, 10])
    plan = Uniform().allocate(graph, random_scores(graph, 0), Budget(macs=0.5, spend=False))
    assert plan.budget == {"macs": 0.5, "spend": False}
    assert "budget macs=0.5, spend=False" in str(plan)
    assert Budget(macs=0.5).as_settings() == {"macs": 0.5}
    with pytest.raises(BudgetError, match="expected spend to be True or False, got 1"):
        Budget(macs=0.5, spend=1)  # type: ignore[arg-type]
    with pytest.raises(BudgetError, match="expected macs or params, got neither"):
        Budget(spend=True)
