"""What holds for every rule, over all that the registry knows and one that it does not."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.allocators import Allocator, Budget, Limits, StepFunction, ToD, Uniform
from secateur.allocators.ranking import ascending
from secateur.allocators.signals import ScoreTable
from secateur.errors import BudgetError, NothingToPruneError, ScoreError, SettingError, UnreachableBudgetError
from secateur.measure.cost import Cost
from secateur.plan import Plan
from secateur.signals.scores import Scores
from tests.allocators.fake import FakeGraph, random_scores, reference_order, reference_tod


class Threshold(Allocator):
    """A user's own rule: units below one threshold go; it knows nothing of limits."""

    name: ClassVar[str] = "threshold"

    def __init__(self, threshold: float = 0.4) -> None:
        self.threshold = threshold

    @property
    def signals(self) -> tuple[str, ...]:
        return ("magnitude",)

    def knob(self, budget: Budget | None) -> float | None:
        return self.threshold

    def settings(self, knob: float | None) -> dict[str, Any]:
        return {"threshold": knob}

    def steps(self, graph: Any, scores: ScoreTable, limits: Limits) -> Mapping[str, StepFunction]:
        found = {}
        for group in graph.groups:  # the ignored ones too: the base leaves them alone
            values = scores["magnitude"][group.name]
            order = ascending(values)
            knob, last = np.unique(values[order], return_index=True)
            found[group.name] = StepFunction(order, knob, np.append(last[1:], len(values)))
        return found


RULES: dict[str, tuple[Any, Any]] = {  # without a budget; with one
    "tod": (ToD(0.25), ToD()),
    "uniform": (Uniform(0.25), Uniform()),
    "own": (Threshold(), Threshold()),
}
each_rule = pytest.mark.parametrize("rule", RULES)


def reference_removed(rule: str, scores: Any, name: str, knob: float, allowed: list[int]) -> int:
    """How many units a group loses, from the rule's definition."""
    size = len(scores["magnitude"][name])
    if rule == "tod":
        u, r = scores["wasserstein"][name], scores["taylor"][name]
        return max((k for k in allowed if k == 0 or reference_tod(u, r, k) <= knob), default=0)
    wanted = size * knob if rule == "uniform" else (scores["magnitude"][name] <= knob).sum()
    return max(k for k in allowed if k <= wanted + 1e-9)


def reference_knobs(rule: str, scores: Any) -> list[float]:
    """Every value of the knob that could matter."""
    values: set[float] = set()
    for name, magnitude in scores["magnitude"].items():
        size = len(magnitude)
        if rule == "tod":
            u, r = scores["wasserstein"][name], scores["taylor"][name]
            values |= {reference_tod(u, r, k) for k in range(1, size + 1)}
        else:
            values |= {k / size for k in range(1, size + 1)} if rule == "uniform" else set(magnitude.tolist())
    return sorted(values)


def reference_costs(rule: str, graph: FakeGraph, scores: Any, limits: Limits) -> list[Cost]:
    """The cost at every value of the knob, and with it off."""
    signal = "wasserstein" if rule == "tod" else "magnitude"
    costs = [graph.cost()]
    for knob in reference_knobs(rule, scores):
        keep = {}
        for group in graph.groups:
            allowed = [0, *limits.feasible(group.size).tolist()]
            k = reference_removed(rule, scores, group.name, knob, allowed)
            keep[group.name] = np.ones(group.size, dtype=bool)
            keep[group.name][reference_order(scores[signal][group.name])[:k]] = False
        costs.append(graph.cost(keep))
    return costs


@pytest.mark.filterwarnings("ignore::secateur.errors.ConstantScoresWarning")  # ties can be constant
@each_rule
@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    seed=st.integers(0, 10**6),
    ties=st.booleans(),
    macs=st.one_of(st.none(), st.integers(2, 98).map(lambda p: p / 100), st.integers(1, 3000)),
    params=st.one_of(st.none(), st.integers(2, 98).map(lambda p: p / 100)),
    round_to=st.integers(1, 3),
)
def test_the_largest_reachable_cost_within_the_budget(
    rule: str, sizes: list[int], seed: int, ties: bool, macs: Any, params: Any, round_to: int
) -> None:
    macs = 0.25 if macs is None and params is None else macs
    budget = Budget(macs=macs, params=params, spend=False)
    asked_for = {name: value for name, value in (("macs", macs), ("params", params)) if value is not None}
    graph, limits = FakeGraph(sizes), Limits(round_to=round_to)
    scores = random_scores(graph, seed, ties=ties)
    costs = reference_costs(rule, graph, scores, limits)
    dense = costs[0]
    within = [
        cost
        for cost in costs
        if all(
            getattr(cost, name)
            <= (math.floor(asked * getattr(dense, name) + 1e-9) if isinstance(asked, float) else asked)
            for name, asked in asked_for.items()
        )
    ]
    allocator = RULES[rule][1]
    if not within:
        with pytest.raises(UnreachableBudgetError) as caught:
            allocator.allocate(graph, scores, budget=budget, limits=limits)
        least = min(costs, key=lambda cost: cost.macs)
        entries = {
            name: getattr(least, name) / (getattr(dense, name) if isinstance(asked, float) else 1)
            for name, asked in asked_for.items()
        }
        assert caught.value.smallest in entries.values()
        return
    plan = allocator.allocate(graph, scores, budget=budget, limits=limits)
    assert (plan.predicted.params, plan.predicted.macs) == max((c.params, c.macs) for c in within)
    assert plan.budget == budget.as_settings()


@each_rule
def test_the_settings_that_a_budget_led_to_give_the_same_plan_without_it(rule: str) -> None:
    graph: Any = FakeGraph([16, 24, 12])
    scores = random_scores(graph, 3)
    plan = RULES[rule][1].allocate(graph, scores, budget=Budget(macs=0.45, spend=False))
    values = {key: value for key, value in plan.settings.items() if key != "limits"}
    again = type(RULES[rule][0])(**values).allocate(graph, scores)
    assert again.groups == plan.groups
    assert again.settings == plan.settings
    assert again.budget is None


@each_rule
def test_a_cost_is_asked_for_a_logarithmic_number_of_times(rule: str) -> None:
    graph: Any = FakeGraph([512] * 20)
    RULES[rule][1].decide(graph, random_scores(graph, 0), Budget(macs=0.3, spend=False), Limits())
    assert graph.costs_asked <= 5 + math.log2(512 * 20)


@each_rule
def test_a_smaller_budget_removes_a_superset(rule: str) -> None:
    graph: Any = FakeGraph([16, 24, 12])
    scores = random_scores(graph, 4)
    large, small = (RULES[rule][1].allocate(graph, scores, budget=Budget(macs=m)) for m in (0.8, 0.3))
    assert all(set(a.removed) <= set(b.removed) for a, b in zip(large.groups, small.groups, strict=True))
    assert small.predicted.macs < large.predicted.macs


@each_rule
def test_the_same_bytes_again_and_nothing_changed(rule: str) -> None:
    graph: Any = FakeGraph([16, 24])
    scores = random_scores(graph, 5)
    before = copy.deepcopy(scores)
    for allocator, budget in zip(RULES[rule], (None, Budget(params=0.6)), strict=True):
        first = allocator.allocate(graph, scores, budget=budget, seed=7)
        second = allocator.allocate(graph, copy.deepcopy(scores), budget=budget, seed=7)
        assert first.to_json() == second.to_json()
        assert first.seed == 7
        assert Plan.from_json(first.to_json()) == first
    for signal, groups in before.items():
        for name, values in groups.items():
            np.testing.assert_array_equal(scores[signal][name], values)


@each_rule
def test_limits_hold_under_a_budget(rule: str) -> None:
    graph: Any = FakeGraph([64, 30, 64, 5])
    limits = Limits(round_to=8, min_keep=12, max_ratio=0.75, ignore=("layer2",))
    plan = RULES[rule][1].allocate(graph, random_scores(graph, 6), budget=Budget(params=0.7), limits=limits)
    kept = {group.name: group.kept for group in plan.groups}
    assert kept["layer0"] in (16, 24, 32, 40, 48, 56, 64)
    assert kept["layer1"] in (16, 24, 30)
    assert (kept["layer2"], kept["layer3"]) == (64, 5)
    assert plan.predicted.params <= 0.7 * plan.dense.params
    assert plan.settings["limits"] == {"round_to": 8, "min_keep": 12, "max_ratio": 0.75, "ignore": ["layer2"]}


@each_rule
def test_limits_can_put_a_budget_out_of_reach(rule: str) -> None:
    graph: Any = FakeGraph([64, 32])
    scores = random_scores(graph, 6)
    with pytest.raises(UnreachableBudgetError, match="smallest that the allocator reaches") as caught:
        RULES[rule][1].allocate(graph, scores, budget=Budget(macs=0.25), limits=Limits(max_ratio=0.25))
    floor = graph.cost({g.name: np.arange(g.size) < 0.75 * g.size for g in graph.groups})
    assert caught.value.smallest == floor.macs / graph.cost().macs
    plan = RULES[rule][1].allocate(
        graph, scores, budget=Budget(macs=caught.value.smallest), limits=Limits(max_ratio=0.25)
    )
    assert plan.predicted.macs == floor.macs


@each_rule
def test_a_budget_that_the_dense_model_meets_removes_nothing(rule: str) -> None:
    graph: Any = FakeGraph([16, 24])
    plan = RULES[rule][1].allocate(graph, random_scores(graph, 6), budget=Budget(macs=10**9))
    assert plan.predicted == plan.dense
    assert set(plan.ratios.values()) == {0.0}


@each_rule
def test_single_units_stay(rule: str) -> None:
    graph: Any = FakeGraph([1, 1])
    scores = {signal: {"layer0": np.zeros(1), "layer1": np.zeros(1)} for signal in random_scores(graph, 0)}
    assert set(RULES[rule][0].allocate(graph, scores).ratios.values()) == {0.0}
    with pytest.raises(UnreachableBudgetError) as caught:
        RULES[rule][1].allocate(graph, scores, budget=Budget(macs=0.5))
    assert caught.value.smallest == 1.0


@pytest.mark.parametrize("rule", ["tod", "uniform"])
def test_scores_that_do_not_fit(rule: str) -> None:
    allocator = RULES[rule][0]
    graph: Any = FakeGraph([4, 6])
    signal = allocator.signals[-1]

    def refused(change: Any, message: str) -> None:
        scores: Any = random_scores(graph, 0)
        change(scores)
        with pytest.raises(ScoreError, match=message):
            allocator.allocate(graph, scores)

    refused(
        lambda s: s.pop(signal),
        rf"expected scores of signal '{signal}', got only '\w+', '\w+'\. Score it too",
    )
    refused(
        lambda s: s[signal].pop("layer1"), f"signal '{signal}', group 'layer1': expected scores, got none"
    )
    refused(
        lambda s: s[signal].update(layer0=np.ones(3)), r"group 'layer0': expected shape \(4,\), .* got \(3,\)"
    )
    for bad in (np.nan, np.inf):
        values = np.array([1.0, bad, 2.0, bad])
        refused(
            lambda s, v=values: s[signal].update(layer0=v),
            rf"finite scores, got {bad} for unit 1 \(2 in all\)",
        )

    # What is ignored need not be scored.
    scores: Any = random_scores(graph, 0)
    for values in scores.values():
        del values["layer1"]
    plan = allocator.allocate(graph, scores, limits=Limits(ignore=("layer1",)))
    assert plan.ratios["layer1"] == 0.0 < plan.ratios["layer0"]


@each_rule
def test_arguments_of_the_wrong_kind(rule: str) -> None:
    graph: Any = FakeGraph([4, 6])
    scores = random_scores(graph, 0)
    allocator = RULES[rule][0]
    with pytest.raises(BudgetError, match=r"expected budget to be a Budget or None, got 0\.5"):
        allocator.allocate(graph, scores, budget=0.5)
    with pytest.raises(SettingError, match="expected limits to be Limits or None, got 8"):
        allocator.allocate(graph, scores, limits=8)
    with pytest.raises(NothingToPruneError, match="no group at all"):
        allocator.allocate(FakeGraph([]), scores)


@each_rule
def test_scores_as_the_score_room_gives_them(rule: str) -> None:
    graph: Any = FakeGraph([4, 6])
    allocator = RULES[rule][0]
    plain = random_scores(graph, 0)
    scores = Scores(plain, fingerprint=graph.fingerprint)
    assert allocator.allocate(graph, scores) == allocator.allocate(graph, plain)
    with pytest.raises(ScoreError, match="expected scores of model"):
        allocator.allocate(graph, Scores(plain, fingerprint="0" * 64))
    with pytest.raises(ScoreError, match=r"expected scores as sc\.score gives them, .* got ndarray"):
        allocator.allocate(graph, np.ones(4))


def test_a_signal_that_was_not_asked_for() -> None:
    graph: Any = FakeGraph([4, 6])
    scores = Scores(random_scores(graph, 0, ("magnitude",)), fingerprint=graph.fingerprint)
    with pytest.raises(ScoreError, match=r"expected scores of signal 'wasserstein', got only 'magnitude'"):
        ToD().allocate(graph, scores)


def test_a_step_function() -> None:
    function = StepFunction(order=np.arange(9), knob=np.array([0.1, 0.5]), count=np.array([2, 7]))
    assert [function.removed(x) for x in (None, 0.0, 0.1, 0.3, 0.5, 9.0)] == [0, 0, 2, 2, 7, 7]
