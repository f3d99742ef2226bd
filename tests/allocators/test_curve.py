"""The curve of a knob against allocating at each of its values."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.allocators import Limits, ToD, Uniform
from secateur.errors import NothingToPruneError, PlanError, ScoreError, SettingError
from secateur.plan import Plan
from tests.allocators.fake import FakeGraph, random_scores
from tests.allocators.test_base import Threshold

RULES: dict[str, Any] = {"tod": ToD, "uniform": Uniform, "own": Threshold}
each_rule = pytest.mark.parametrize("rule", RULES)

pytestmark = pytest.mark.filterwarnings("ignore::secateur.errors.ConstantScoresWarning")


@each_rule
@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=3),
    seed=st.integers(0, 10**6),
    ties=st.booleans(),
    round_to=st.integers(1, 3),
    ignore=st.booleans(),
)
def test_each_point_is_what_allocating_there_gives(
    rule: str, sizes: list[int], seed: int, ties: bool, round_to: int, ignore: bool
) -> None:
    graph: Any = FakeGraph([*sizes, 5])
    limits = Limits(round_to=round_to, ignore=("layer0",) if ignore else ())
    scores = random_scores(graph, seed, ties=ties)
    curve = RULES[rule]().curve(graph, scores, limits)
    names = [g.name for g in graph.groups[ignore:]]
    assert (curve.allocator, list(curve.groups)) == (
        RULES[rule]().name if rule != "own" else "threshold",
        names,
    )
    assert curve.sizes.tolist() == [g.size for g in graph.groups[ignore:]]
    assert curve.knob[0] == -np.inf
    assert (np.diff(curve.knob) > 0).all()
    dense = graph.cost()
    assert (curve.params[0], curve.macs[0]) == (dense.params, dense.macs)
    assert (curve.kept[0] == curve.sizes).all()
    for point in range(1, len(curve)):
        # At the value itself, and just below it: the point before.
        for knob, expected in ((curve.knob[point], point), (np.nextafter(curve.knob[point], -1), point - 1)):
            if not 0 <= knob < 1:
                continue
            plan = RULES[rule](float(knob)).allocate(graph, scores, limits=limits)
            assert curve.at(knob) == expected
            assert (plan.predicted.params, plan.predicted.macs) == (
                curve.params[expected],
                curve.macs[expected],
            )
            kept = {g.name: g.kept for g in plan.groups}
            assert [kept[name] for name in names] == curve.kept[expected].tolist()


@each_rule
def test_no_point_repeats_another_and_the_last_is_all_that_may_go(rule: str) -> None:
    graph: Any = FakeGraph([16, 24, 12])
    limits = Limits(round_to=4)
    curve = RULES[rule]().curve(graph, random_scores(graph, 1), limits)
    assert (np.diff(curve.kept, axis=0) <= 0).all()
    assert (np.diff(curve.kept, axis=0) < 0).any(axis=1).all()
    assert (curve.kept % 4 == 0).all()
    assert curve.kept[-1].tolist() == [4, 4, 4]


def test_a_value_of_the_knob_finds_its_point() -> None:
    graph: Any = FakeGraph([4])
    curve = Uniform().curve(graph, {"magnitude": {"layer0": np.arange(4.0)}})
    assert curve.knob[1:].tolist() == [0.25, 0.5, 0.75]
    assert [curve.at(v) for v in (-1.0, 0.0, 0.25, 0.49, 0.5, 9.0)] == [0, 0, 1, 1, 2, 3]
    with pytest.raises(SettingError, match="expected a value of the knob, got nan"):
        curve.at(float("nan"))
    assert curve.to_dict() == {
        "allocator": "uniform",
        "groups": [{"name": "layer0", "units": 4}],
        "knob": [None, 0.25, 0.5, 0.75],
        "params": curve.params.tolist(),
        "macs": curve.macs.tolist(),
        "kept": [[4], [3], [2], [1]],
    }


@pytest.mark.parametrize("most", [2, 5, 40, 10_000])
def test_spread_points_are_even_in_macs(most: int) -> None:
    graph: Any = FakeGraph([60, 80, 40])
    curve = ToD().curve(graph, random_scores(graph, 1))
    points = curve.spread(most).tolist()
    assert points[0] == 0
    assert points[-1] == len(curve) - 1
    assert len(points) == len(set(points)) <= most
    if most == 40:
        widest = -np.diff(curve.macs).min()  # what no choice of points can get around
        assert -np.diff(curve.macs[points]).min() <= (curve.macs[0] - curve.macs[-1]) / 39 + widest
    if most == 10_000:
        assert len(points) > 0.9 * len(curve)
    with pytest.raises(SettingError, match="expected at least 2 points, got 1"):
        curve.spread(1)


def test_groups_that_cannot_lose_a_unit_give_one_point() -> None:
    graph: Any = FakeGraph([1, 1])
    curve = ToD().curve(graph, random_scores(graph, 0))
    assert (len(curve), curve.spread(5).tolist(), curve.at(0.5)) == (1, [0], 0)


def test_bad_input_is_refused_as_by_allocate() -> None:
    graph: Any = FakeGraph([4, 6])
    scores: Any = random_scores(graph, 0)
    with pytest.raises(SettingError, match="expected limits to be Limits"):
        ToD().curve(graph, scores, 8)  # type: ignore[arg-type]
    with pytest.raises(NothingToPruneError, match="all 2 groups ignored"):
        ToD().curve(graph, scores, Limits(ignore=("*",)))
    with pytest.raises(ScoreError, match="expected scores of signal 'taylor'"):
        ToD().curve(graph, {"wasserstein": scores["wasserstein"]})


def test_a_plan_remembers_its_curve_and_does_not_write_it() -> None:
    graph: Any = FakeGraph([12, 9])
    scores = random_scores(graph, 3)
    plan = ToD(0.3).allocate(graph, scores)
    whole = ToD().curve(graph, scores)
    assert plan.curve.macs.tolist() == whole.macs.tolist()
    assert plan.curve.kept.tolist() == whole.kept.tolist()
    point = plan.curve.at(0.3)
    assert plan.predicted.macs == plan.curve.macs[point]
    again = Plan.from_json(plan.to_json())
    assert again == plan
    with pytest.raises(PlanError, match="read from a file"):
        _ = again.curve
