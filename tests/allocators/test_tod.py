from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.allocators import Budget, Limits, ToD, Uniform, tolerance_curve
from secateur.allocators.tod import group_certificate
from secateur.errors import ConstantScoresWarning, ScoreError, SettingError
from tests.allocators.fake import FakeGraph, random_scores, reference_order, reference_tod

tied = st.integers(1, 14).flatmap(
    lambda n: st.tuples(
        *2 * [st.lists(st.integers(0, 3), min_size=n, max_size=n).map(lambda v: np.array(v, float))]
    )
)
distinct = st.integers(1, 14).flatmap(
    lambda n: st.tuples(*2 * [st.permutations(range(n)).map(lambda v: np.array(v, float))])
)
tolerances = st.sampled_from([0.0, 0.05, 0.1, 0.25, 1 / 3, 0.5, 0.75, 1.0])


# Short vectors of few values are often constant, which ToD warns of; that it does has tests of its own.
pytestmark = pytest.mark.filterwarnings("ignore::secateur.errors.ConstantScoresWarning")


def lost(removal: np.ndarray, protection: np.ndarray, tolerance: float, **limits: Any) -> tuple[int, ...]:
    """The units that a group of its own loses."""
    plan = ToD(tolerance, removal="u", protection="r").allocate(
        FakeGraph([len(removal)]),  # type: ignore[arg-type]
        {"u": {"layer0": removal}, "r": {"layer0": protection}},
        limits=Limits(**limits),
    )
    return plan.groups[0].removed


@given(tied)
def test_the_curve_is_the_papers_set_formula(scores: tuple[np.ndarray, np.ndarray]) -> None:
    curve = tolerance_curve(*scores)
    assert curve.tolist() == [reference_tod(*scores, k) for k in range(1, len(curve) + 1)]


@given(tied, tolerances, st.integers(1, 4))
def test_a_group_loses_the_largest_k_within_the_tolerance(
    scores: tuple[np.ndarray, np.ndarray], tolerance: float, round_to: int
) -> None:
    removal, protection = scores
    size = len(removal)
    within = [
        k
        for k in range(1, size + 1)
        if k <= 0.99 * size
        and (size - k) % round_to == 0
        and reference_tod(removal, protection, k) <= tolerance
    ]
    k = max(within, default=0)
    assert lost(removal, protection, tolerance, round_to=round_to) == tuple(
        sorted(reference_order(removal)[:k])
    )


def test_the_curve_is_not_monotone_and_the_largest_k_is_taken() -> None:
    removal, protection = np.arange(4.0), np.array([9.0, 1.0, 2.0, 3.0])
    assert tolerance_curve(removal, protection).tolist() == [1.0, 0.5, 2 / 3, 1.0]
    assert lost(removal, protection, 0.5) == (0, 1)
    assert lost(removal, protection, 0.49) == ()
    # Two may go but leave two, no multiple of 3; one would leave three, but one is beyond the tolerance.
    assert lost(removal, protection, 0.5, round_to=3) == ()


@given(tied, tolerances, tolerances)
def test_more_tolerance_never_removes_less(scores: tuple[np.ndarray, np.ndarray], a: float, b: float) -> None:
    assert set(lost(*scores, min(a, b))) <= set(lost(*scores, max(a, b)))


@given(tied)
def test_full_tolerance_removes_what_the_limits_allow(scores: tuple[np.ndarray, np.ndarray]) -> None:
    size = len(scores[0])
    assert len(lost(*scores, 1.0)) == int(0.99 * size)
    assert len(lost(*scores, 1.0, max_ratio=0.25)) == size // 4


@given(distinct, tolerances, st.randoms(use_true_random=False))
def test_units_may_be_renumbered(
    scores: tuple[np.ndarray, np.ndarray], tolerance: float, random: Any
) -> None:
    moved = list(range(len(scores[0])))
    random.shuffle(moved)  # unit i is at place j where moved[j] = i
    again = lost(scores[0][moved], scores[1][moved], tolerance)
    assert {moved[j] for j in again} == set(lost(*scores, tolerance))


@given(distinct, tolerances, st.data())
def test_only_the_ranks_matter(
    scores: tuple[np.ndarray, np.ndarray], tolerance: float, data: st.DataObject
) -> None:
    def transformed(values: np.ndarray) -> np.ndarray:
        steps = data.draw(st.lists(st.integers(1, 50), min_size=len(values), max_size=len(values)))
        return np.cumsum(steps)[values.astype(int)] - 7.0

    assert lost(transformed(scores[0]), transformed(scores[1]), tolerance) == lost(*scores, tolerance)


@pytest.mark.parametrize("size", [1, 2, 3, 16, 37])
@pytest.mark.parametrize("tolerance", [0.0, 0.1, 0.25])
def test_equal_scores_rank_alike_so_half_goes_from_the_end(size: int, tolerance: float) -> None:
    expected = min(int(size / (2 - tolerance)), int(0.99 * size))
    assert lost(np.ones(size), np.ones(size), tolerance) == tuple(range(size - expected, size))
    # As for any two signals that rank alike.
    assert len(lost(np.arange(size), np.arange(size), tolerance)) == expected


def test_signals_that_contradict_each_other_remove_nothing() -> None:
    assert lost(np.arange(20.0), -np.arange(20.0), 0.99) == ()


def test_one_tolerance_for_all_groups() -> None:
    graph = FakeGraph([10, 10])
    up = np.arange(10.0)
    scores = {"wasserstein": {"layer0": up, "layer1": up}, "taylor": {"layer0": up, "layer1": -up}}
    plan = ToD(tolerance=0.25).allocate(graph, scores)  # type: ignore[arg-type]
    assert plan.ratios == {"layer0": 0.5, "layer1": 0.0}
    assert plan.settings["tolerance"] == plan.certificates["tolerance"] == 0.25


def test_either_signal_can_be_any_other() -> None:
    graph = FakeGraph([9, 12])
    scores = random_scores(graph, 0)
    rule = ToD(0.25, removal="magnitude", protection="magnitude")
    assert rule.signals == ("magnitude",)
    assert ToD().signals == ("wasserstein", "taylor")
    assert rule.allocate(graph, {"magnitude": scores["magnitude"]}).ratios["layer0"] == 5 / 9  # type: ignore[arg-type]


@pytest.mark.parametrize("tolerance", [-0.01, 1.01, float("nan"), True, "0.1", None])
def test_tolerance_out_of_range(tolerance: Any) -> None:
    with pytest.raises(SettingError, match=r"ToD: expected tolerance in \[0, 1\], got "):
        ToD(tolerance)


def test_the_curve_wants_two_vectors_of_one_length() -> None:
    with pytest.raises(
        ScoreError, match=r"ToD: expected two score vectors of one length, got \(3,\) and \(4,\)"
    ):
        tolerance_curve(np.ones(3), np.ones(4))


# Certificates


@given(distinct, tolerances)
def test_no_removed_set_that_the_tolerance_allows_carries_more_than_the_bound(
    scores: tuple[np.ndarray, np.ndarray], tolerance: float
) -> None:
    removal, protection = scores
    removal, protection = removal[:8], protection[:8]
    size = len(removal)
    gone = lost(removal, protection, tolerance)
    k = len(gone)
    found = group_certificate(removal, protection, k, tolerance)
    top = set(reference_order(protection)[size - k :])
    most = max(m for m in range(k + 1) if m == 0 or m / k <= tolerance)
    # Every set of k units with at most that many among the k most protected: the bounds are their maxima.
    sets = [set(s) for s in itertools.combinations(range(size), k) if len(top & set(s)) <= most]
    total = protection.sum()
    if total == 0:
        assert found["mass"] is found["mass_bound"] is found["high_mass"] is found["high_mass_bound"] is None
        return
    assert found["overlap_bound"] == most
    assert found["overlap"] == len(top & set(gone)) <= most
    assert found["mass"] == pytest.approx(protection[list(gone)].sum() / total)
    assert found["high_mass"] == pytest.approx(sum(protection[i] for i in top & set(gone)) / total)
    assert found["mass_bound"] == pytest.approx(max(protection[list(s)].sum() for s in sets) / total)
    if most <= k and any(len(top & s) == most for s in sets):
        assert found["high_mass_bound"] == pytest.approx(
            max(protection[list(s & top)].sum() for s in sets) / total
        )


@given(tied, tolerances, st.sampled_from([1.0, 1e-300, 3e307, 0.1]))
def test_what_happened_is_never_above_the_bound(
    scores: tuple[np.ndarray, np.ndarray], tolerance: float, scale: float
) -> None:
    removal, protection = scores[0], scores[1] * scale
    k = len(lost(removal, protection, tolerance))
    found: Any = group_certificate(removal, protection, k, tolerance)
    assert found["tod"] <= tolerance
    assert found["overlap"] <= found["overlap_bound"]
    if protection.max() > 0:
        assert 0 <= found["high_mass"] <= found["mass"] <= found["mass_bound"] <= 1
        assert found["high_mass"] <= found["high_mass_bound"]


@given(distinct, tolerances, st.data())
def test_the_bounds_hold_when_fewer_go_than_the_tolerance_lets_go(
    scores: tuple[np.ndarray, np.ndarray], tolerance: float, data: st.DataObject
) -> None:
    removal, protection = scores[0][:8].argsort().argsort(), scores[1][:8] + 1
    size = len(removal)
    first = reference_order(removal)[: len(lost(removal, protection, tolerance))]
    k = len(first)
    went = data.draw(st.integers(0, k))
    found: Any = group_certificate(removal, protection, k, tolerance, removed=went)
    top = set(reference_order(protection)[size - k :])
    most = max(m for m in range(k + 1) if m == 0 or m / k <= tolerance)
    total = protection.sum()
    assert (found["removed"], found["allowed"]) == (went, k)
    assert found["tod"] == (len(top & set(first)) / k if k else 0.0) <= tolerance
    assert found["overlap"] == len(top & set(first[:went])) <= found["overlap_bound"] == min(most, went)
    assert found["mass"] == pytest.approx(protection[first[:went]].sum() / total)
    # Every set of so many units with at most `most` of them among the k most protected.
    sets = [set(s) for s in itertools.combinations(range(size), went) if len(top & set(s)) <= most]
    assert found["mass_bound"] == pytest.approx(max(protection[list(s)].sum() for s in sets) / total)
    assert found["high_mass"] <= found["high_mass_bound"]
    assert found["mass"] <= found["mass_bound"]


def test_shares_of_negative_scores_have_no_meaning() -> None:
    found = group_certificate(np.arange(4.0), np.array([-1.0, 0.0, 1.0, 2.0]), 1, 0.1)
    assert found["mass"] is None
    assert found["overlap"] == 0


def test_a_plan_carries_them() -> None:
    graph = FakeGraph([20, 30, 25])
    scores = random_scores(graph, 5)
    plan = ToD(0.25).allocate(graph, scores, limits=Limits(ignore=("layer1",)))  # type: ignore[arg-type]
    groups: Any = plan.certificates["groups"]
    assert set(groups) == {"layer0", "layer2"}
    for name, found in groups.items():
        k = found["removed"]
        assert k == round(plan.ratios[name] * len(scores["taylor"][name])) > 0
        exact = reference_tod(scores["wasserstein"][name], scores["taylor"][name], k)
        assert found["tod"] == pytest.approx(exact, rel=1e-3)
        assert found["overlap_bound"] == k // 4


@pytest.mark.parametrize("tolerance", [0.1, 0.25, 0.5])
def test_a_spent_budget_leaves_every_bound_true(tolerance: float) -> None:
    graph: Any = FakeGraph([20, 30, 25])
    scores = random_scores(graph, 5)
    budget = Budget(macs=1 - tolerance)
    plan = ToD().allocate(graph, scores, budget)
    alone = ToD().allocate(graph, scores, Budget(macs=1 - tolerance, spend=False))
    assert plan.certificates["tolerance"] == pytest.approx(alone.settings["tolerance"], rel=1e-3)
    fewer = 0
    for name, found in plan.certificates["groups"].items():  # type: ignore[union-attr]
        assert isinstance(found, dict)
        u, r, k, gone = (
            scores["wasserstein"][name],
            scores["taylor"][name],
            found["allowed"],
            found["removed"],
        )
        assert k == alone.certificates["groups"][name]["removed"]  # type: ignore[index, call-overload]
        assert gone == round(plan.ratios[name] * len(u))
        assert found["tod"] == pytest.approx(reference_tod(u, r, k) if k else 0, rel=1e-3)
        assert found["tod"] <= plan.certificates["tolerance"]  # type: ignore[operator]
        assert found["overlap"] <= found["overlap_bound"]
        assert found["mass"] <= found["mass_bound"]
        fewer += k - gone
    assert fewer > 0


# The exchange with uniform


@pytest.mark.parametrize("budget", [None, Budget(macs=0.75), Budget(params=0.5, spend=False)])
def test_the_exchange_is_with_what_uniform_removes_at_the_same_budget(budget: Budget | None) -> None:
    graph: Any = FakeGraph([20, 30, 25])
    scores = random_scores(graph, 8)
    limits = Limits(ignore=("layer1",))
    plan = ToD(0.3).allocate(graph, scores, budget, limits)
    same = budget or Budget(macs=plan.predicted.macs)
    other = Uniform(removal="wasserstein").allocate(graph, scores, same, limits)
    found: Any = plan.certificates["exchange"]
    assert found["ratio"] == pytest.approx(other.settings["ratio"], rel=1e-3)
    assert found["macs"] == [plan.predicted.macs, other.predicted.macs]
    assert found["params"] == [plan.predicted.params, other.predicted.params]
    if budget is None:
        assert other.predicted.macs <= plan.predicted.macs
    protection = {name: scores["taylor"][name] for name in ("layer0", "layer2")}
    total = sum(float(values.sum()) for values in protection.values())
    ours, theirs = ({g.name: set(g.removed) for g in p.groups} for p in (plan, other))
    losses = [
        sum(protection[name][i] for name in protection for i in gone[name]) / total for gone in (ours, theirs)
    ]
    assert [found["loss"], found["other_loss"]] == pytest.approx(losses, rel=1e-3)
    assert found["other_loss"] + found["taken"] - found["spared"] == pytest.approx(found["loss"], abs=2e-4)
    assert found["taken"] + found["spared"] > 0
    assert set(found["groups"]) == set(protection)
    for name, own in found["groups"].items():
        assert own["other_removed"] == len(theirs[name])
        for key, units in (("taken", ours[name] - theirs[name]), ("spared", theirs[name] - ours[name])):
            assert own[key] == pytest.approx(sum(protection[name][i] for i in units) / total, rel=1e-3)


def test_without_removal_there_is_nothing_to_exchange() -> None:
    graph: Any = FakeGraph([20, 30])
    plan = ToD().allocate(graph, random_scores(graph, 8), Budget(macs=10**9))
    assert plan.certificates["exchange"] is None


def test_negative_protection_has_no_shares_to_exchange() -> None:
    graph: Any = FakeGraph([20])
    scores = random_scores(graph, 8)
    scores["taylor"]["layer0"] -= 0.5
    found: Any = ToD(0.5).allocate(graph, scores).certificates["exchange"]
    assert found["loss"] is found["taken"] is found["groups"]["layer0"]["spared"] is None
    assert found["groups"]["layer0"]["other_removed"] > 0


# Constant scores


@pytest.mark.parametrize("signals", [("wasserstein",), ("taylor",), ("wasserstein", "taylor")])
def test_constant_scores_are_warned_of_once_a_plan(signals: tuple[str, ...]) -> None:
    graph: Any = FakeGraph([20, 30, 25, 1])
    scores = random_scores(graph, 5)
    for signal in signals:
        scores[signal]["layer0"][:] = scores[signal]["layer2"][:] = 0.7
    said = rf"same score for every unit from {' and '.join(sorted(signals))} in 'layer0', 'layer2'\. How"
    with pytest.warns(ConstantScoresWarning, match=said) as caught:
        plan = ToD(0.5).allocate(graph, scores)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    expected = sorted(signals, reverse=True)
    assert plan.certificates["constant"] == {"layer0": expected, "layer2": expected}


@pytest.mark.filterwarnings("error")
def test_scores_that_are_not_constant_or_where_nothing_goes_are_not_warned_of() -> None:
    graph: Any = FakeGraph([20, 1])
    scores = random_scores(graph, 5)
    assert ToD(0.5).allocate(graph, scores).certificates["constant"] == {}
    scores["taylor"]["layer0"][:] = 1.0
    assert ToD(0.5).allocate(graph, scores, Budget(macs=10**9)).certificates["constant"] == {}
