"""Rules for units decide on experts, within what routers can work with."""

from __future__ import annotations

import numpy as np
import pytest

import secateur as sc
from secateur.pipeline.targets.experts import Experts
from secateur.targets.experts.graph import ExpertGraph
from tests.targets.experts.models import Mixture, PlainLM, make, words

SIGNALS = ("reap", "expert_taylor", "frequency")
RULES = {
    "tod": sc.ToD(removal="frequency", protection="reap"),
    "uniform": sc.Uniform(removal="frequency"),
    "global": Experts.rule("global"),
    "emp": Experts.rule("emp"),
}


@pytest.fixture(scope="module")
def graphs() -> dict[str, ExpertGraph]:
    return {family: sc.trace(make(family), words(), granularity="expert") for family in ("qwen2", "deepseek")}


def table(graph: ExpertGraph, seed: int) -> dict[str, dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return {s: {b.name: rng.uniform(0.1, 1, b.count) for b in graph.blocks} for s in SIGNALS}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("family", ["qwen2", "deepseek"])
@pytest.mark.parametrize("seed", range(3))
def test_matched_totals_and_what_routers_need(
    graphs: dict[str, ExpertGraph], family: str, rule: str, seed: int
) -> None:
    graph = graphs[family]
    for total in (12, 10, 8):
        plan = RULES[rule].allocate(graph, table(graph, seed), sc.Budget(experts=total))
        assert sum(g.kept for g in plan.groups) == total
        for group in plan.groups:
            block = graph.block(group.name)
            assert group.kept >= block.min_keep
            assert len(set(group.keep.reshape(block.routing_groups, -1).sum(1).tolist())) == 1


@pytest.mark.parametrize("seed", range(3))
def test_each_routing_group_loses_its_own_lowest(graphs: dict[str, ExpertGraph], seed: int) -> None:
    graph = graphs["deepseek"]
    scores = table(graph, seed)
    plan = sc.Uniform(removal="reap").allocate(graph, scores, sc.Budget(experts=12))
    for group in plan.groups:
        per_group = scores["reap"][group.name].reshape(2, -1)
        lowest = [
            4 * g + int(i)
            for g, row in enumerate(per_group)
            for i in row.argsort()[: len(group.removed) // 2]
        ]
        assert sorted(lowest) == list(group.removed)


def test_without_routing_groups_it_is_the_rule_itself(graphs: dict[str, ExpertGraph]) -> None:
    graph = graphs["qwen2"]
    rule = sc.ToD(tolerance=0.4, removal="frequency", protection="reap")
    limits = sc.Limits(min_keep=2)
    assert graph.adapted(rule, limits) == (rule, limits)


def test_too_small_a_budget_says_what_can_be_reached(graphs: dict[str, ExpertGraph]) -> None:
    graph = graphs["deepseek"]
    with pytest.raises(sc.UnreachableBudgetError, match=r"got 8 \(50.00%\) as the smallest") as caught:
        Experts.rule("uniform").allocate(graph, table(graph, 0), sc.Budget(experts=7))
    assert caught.value.smallest == 8


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("family", ["qwen2", "deepseek"])
def test_equal_counts_by_any_rule(graphs: dict[str, ExpertGraph], family: str, rule: str) -> None:
    graph = graphs[family]
    scores = table(graph, 1)
    free = RULES[rule].allocate(graph, scores, sc.Budget(experts=11))
    plan = sc.EqualCounts(RULES[rule]).allocate(graph, scores, sc.Budget(experts=11))
    assert [g.kept for g in plan.groups] == ([5, 5] if family == "qwen2" else [4, 4])
    assert plan.allocator == free.allocator
    assert plan.settings["equal_counts"] is True
    again = sc.EqualCounts(RULES[rule]).allocate(graph, scores, sc.Budget(experts=11, spend=False))
    assert again == plan


def test_equal_counts_need_a_budget_and_equal_blocks(graphs: dict[str, ExpertGraph]) -> None:
    graph = graphs["qwen2"]
    with pytest.raises(sc.SettingError, match="EqualCounts: expected a budget, got none"):
        sc.EqualCounts(Experts.rule("tod")).allocate(graph, table(graph, 0))
    model = PlainLM().eval()
    model.blocks[0] = Mixture(experts=9)
    uneven = sc.trace(model.eval(), words(), granularity="expert")
    equal = sc.EqualCounts(Experts.rule("uniform"))
    with pytest.raises(sc.SettingError, match=r"one number of experts, got \[6, 9\]"):
        equal.allocate(uneven, table(uneven, 0), sc.Budget(experts=0.5))


def test_a_budget_in_experts_is_for_experts() -> None:
    from tests.allocators.fake import FakeGraph, random_scores

    fake = FakeGraph([6, 6])
    with pytest.raises(sc.BudgetError, match=r"got experts. Use granularity 'expert'"):
        sc.Uniform().allocate(fake, random_scores(fake, 0), sc.Budget(experts=4))  # type: ignore[arg-type]


def test_unknown_rules_are_refused() -> None:
    with pytest.raises(sc.SettingError, match="expected one of tod, emp, global, uniform, random or an"):
        Experts.rule("lottery")
