"""Histograms and curves against literal counting."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.allocators import Budget, ToD, Uniform
from secateur.plan import Plan
from secateur.report import collect
from secateur.report.collect import BINS, histogram, knob_of, layers_of
from secateur.report.data import Histogram
from secateur.signals.scores import Scores
from tests.allocators.fake import FakeGraph

FINITE = st.floats(allow_nan=False, allow_infinity=False)


def counted(found: Histogram, scores: np.ndarray[Any, Any]) -> list[int]:
    """A literal count: a bin holds its lower edge, the last one both."""
    last = len(found.edges) - 2
    return [
        sum(
            1
            for s in scores
            if found.edges[i] <= s and (s < found.edges[i + 1] or (i == last and s <= found.edges[-1]))
        )
        for i in range(last + 1)
    ]


@given(st.lists(st.tuples(FINITE, st.booleans()), min_size=1, max_size=60))
def test_every_unit_is_counted_once_where_its_score_is(units: list[tuple[float, bool]]) -> None:
    scores, keep = np.array([s for s, _ in units]), np.array([k for _, k in units])
    found = histogram("any", scores, keep)
    assert found.edges[0] == scores.min()
    assert found.edges[-1] == scores.max()
    assert list(found.edges) == sorted(found.edges)
    assert all(np.isfinite(found.edges))
    assert list(found.kept) == counted(found, scores[keep])
    assert list(found.removed) == counted(found, scores[~keep])
    assert sum(found.kept) + sum(found.removed) == len(units)


@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=12))
def test_the_cut_parts_what_stays_from_what_goes(units: list[tuple[int, bool]]) -> None:
    kept = [float(s) for s, k in units if k]
    gone = [float(s) for s, k in units if not k]
    found = histogram("any", np.array([float(s) for s, _ in units]), np.array([k for _, k in units]))
    parted = bool(gone) and bool(kept) and all(g <= k for g in gone for k in kept)
    if kept:
        assert found.cut == (min(kept) if parted else None)


def test_skewed_scores_get_bins_of_equal_factors() -> None:
    keep = np.ones(30, dtype=np.bool_)
    skewed = histogram("any", np.geomspace(1e-6, 1.0, 30), keep)
    assert skewed.scale == "log"
    assert max(skewed.kept) <= 3
    np.testing.assert_allclose(np.diff(np.log(skewed.edges)), np.log(1e6) / BINS, rtol=1e-9)
    assert histogram("any", np.linspace(1e-6, 1.0, 30), keep).scale == "linear"
    assert histogram("any", np.append(np.geomspace(1e-6, 1.0, 29), 0.0), keep).scale == "linear"
    assert histogram("any", np.full(30, 3.0), keep).edges == (3.0, 3.0)


@pytest.fixture
def planned() -> tuple[Any, Scores, Plan]:
    graph: Any = FakeGraph([20, 300])
    rng = np.random.default_rng(0)
    scores = Scores(
        {s: {g.name: rng.uniform(size=g.size) for g in graph.groups} for s in ToD().signals},
        fingerprint=graph.fingerprint,
    )
    return graph, scores, ToD().allocate(graph, scores, Budget(macs=0.5))


def test_layers_show_every_signal(planned: tuple[Any, Scores, Plan]) -> None:
    _, scores, plan = planned
    for layer, group in zip(layers_of(plan, scores), plan.groups, strict=True):
        assert [h.signal for h in layer.scores] == list(scores.signals)
        assert {(sum(h.kept), sum(h.removed)) for h in layer.scores} == {
            (group.kept, group.size - group.kept)
        }
        removal = scores["wasserstein"][group.name]
        assert layer.scores[0].cut == removal[group.keep].min()
    assert all(not layer.scores for layer in layers_of(plan))


def test_the_curve_is_thinned_and_true_at_its_points(
    planned: tuple[Any, Scores, Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collect, "POINTS", 50)
    graph, scores, plan = planned
    curve, found = plan.curve, knob_of(plan)
    assert found is not None
    assert len(curve) > 100
    assert 25 < len(found.values) <= 50  # the first point has no value, the plan's may be one more
    assert (found.macs[0], found.params[0]) == (curve.macs[0], curve.params[0])
    for i, value in enumerate(found.values, start=1):
        at = ToD(tolerance=value).allocate(graph, scores).predicted
        assert (found.macs[i], found.params[i]) == (at.macs, at.params)
    assert found.macs[-1] == curve.macs[-1]


@pytest.mark.parametrize("tolerance", [0.0, 0.1, 0.25, 0.9])
def test_without_a_budget_the_plan_is_a_point(planned: tuple[Any, Scores, Plan], tolerance: float) -> None:
    graph, scores, _ = planned
    plan = ToD(tolerance=tolerance).allocate(graph, scores)
    found = knob_of(plan)
    assert found is not None
    if plan.predicted == plan.dense:
        assert found.at is None
    else:
        assert found.at is not None
        assert found.values[found.at] <= tolerance
        assert found.macs[found.at + 1] == plan.predicted.macs


def test_under_a_budget_the_knob_stands_where_the_rule_says(planned: tuple[Any, Scores, Plan]) -> None:
    graph, scores, _ = planned
    for rule, name in ((ToD(), "tolerance"), (Uniform(removal="taylor"), "ratio")):
        for macs in (0.9, 0.5, 0.2):
            plan = rule.allocate(graph, scores, Budget(macs=macs))
            found = knob_of(plan)
            assert found is not None
            assert found.at is not None
            assert found.values[found.at] == pytest.approx(plan.settings[name], rel=1e-5)
            assert found.macs[found.at + 1] <= plan.predicted.macs


def test_a_plan_from_a_file_has_no_curve(planned: tuple[Any, Scores, Plan]) -> None:
    assert knob_of(Plan.from_json(planned[2].to_json())) is None
