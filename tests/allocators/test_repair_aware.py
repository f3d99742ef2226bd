"""The path of least error for what is saved, against trying every plan."""

from __future__ import annotations

from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import secateur as sc
from secateur.errors import SettingError


def chain(*widths: int) -> sc.Graph:
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return sc.trace(nn.Sequential(*layers[:-1]), torch.randn(2, widths[0]))


def convex(graph: sc.Graph, seed: int = 0) -> dict[str, dict[str, np.ndarray]]:
    draw = np.random.default_rng(seed)
    return {
        "reconstruction": {
            g.name: draw.permutation(np.cumsum(np.sort(draw.uniform(0.01, 1, g.size)))) for g in graph.groups
        }
    }


def error(scores: Any, plan: sc.Plan) -> float:
    values = scores["reconstruction"]
    return sum(float(np.sort(values[g.name])[g.size - g.kept - 1]) for g in plan.groups if g.kept < g.size)


@pytest.mark.parametrize("seed", range(4))
def test_near_the_best_of_all_plans(seed: int) -> None:
    # Two layers apart, so that the groups' costs do not depend on each other.
    graph = chain(3, 6, 5, 4)
    scores = convex(graph, seed)
    first, second = graph.groups
    for share in (0.8, 0.6, 0.4):
        plan = sc.RepairAware().allocate(graph, scores, sc.Budget(macs=share))
        best = np.inf
        for a, b in product(range(first.size), range(second.size)):
            keep = {}
            for group, count in ((first, a), (second, b)):
                mask = np.ones(group.size, dtype=bool)
                mask[np.argsort(scores["reconstruction"][group.name])[:count]] = False
                keep[group.name] = mask
            if graph.cost(keep).macs <= share * graph.cost().macs:
                values = [np.sort(scores["reconstruction"][g.name]) for g in (first, second)]
                best = min(best, sum(v[n - 1] for v, n in zip(values, (a, b), strict=True) if n))
        assert error(scores, plan) <= 1.25 * best + 0.2  # one unit of either layer, at most
        assert plan.certificates["sum"] == pytest.approx(error(scores, plan), rel=1e-3)


def test_what_costs_more_goes_first_at_equal_errors() -> None:
    graph = chain(50, 8, 8, 2)
    values = np.arange(1.0, 9.0)
    scores = {"reconstruction": {g.name: values for g in graph.groups}}
    plan = sc.RepairAware().allocate(graph, scores, sc.Budget(macs=0.7))
    dear, cheap = (g.size - g.kept for g in plan.groups)
    assert dear > cheap
    # By parameters too, and the other way round where the costs are.
    other = chain(2, 8, 8, 50)
    scores = {"reconstruction": {g.name: values for g in other.groups}}
    plan = sc.RepairAware(per="params").allocate(other, scores, sc.Budget(params=0.7))
    cheap, dear = (g.size - g.kept for g in plan.groups)
    assert dear > cheap


@pytest.mark.parametrize(
    ("budget", "per"),
    [
        (sc.Budget(macs=0.7), "macs"),
        (sc.Budget(params=0.7), "params"),
        (sc.Budget(macs=0.7, params=0.7), "macs"),
        (None, "macs"),
    ],
)
def test_units_are_weighed_by_the_cost_that_the_budget_bounds(budget: sc.Budget | None, per: Any) -> None:
    graph = chain(9, 7, 8, 3)
    scores = convex(graph)
    error = 0.5 if budget is None else None
    plan = sc.RepairAware(error).allocate(graph, scores, budget)
    assert plan.settings["per"] == per
    assert plan.groups == sc.RepairAware(error, per=per).allocate(graph, scores, budget).groups


def test_every_budget_is_on_one_path() -> None:
    graph = chain(5, 9, 8, 7, 3)
    scores = convex(graph)
    kept = []
    for share in (0.9, 0.7, 0.5, 0.3):
        plan = sc.RepairAware().allocate(graph, scores, sc.Budget(macs=share, spend=False))
        kept.append([g.kept for g in plan.groups])
    assert all(a >= b for more, fewer in pairwise(kept) for a, b in zip(more, fewer, strict=True))
    curve = sc.RepairAware().curve(graph, scores)
    assert int(np.asarray(curve.kept).min()) == 1


def test_a_group_with_a_higher_factor_keeps_more() -> None:
    graph = chain(5, 9, 8, 7, 3)
    scores, budget = convex(graph), sc.Budget(macs=0.5)
    plain = sc.RepairAware().allocate(graph, scores, budget)
    alike = {g.name: 3.0 for g in plain.groups}
    assert sc.RepairAware(factors=alike).allocate(graph, scores, budget).groups == plain.groups
    name = plain.groups[1].name
    kept = [
        {g.name: g.kept for g in rule.allocate(graph, scores, budget).groups}
        for rule in (sc.RepairAware(factors={name: f}) for f in (0.01, 1.0, 100.0))
    ]
    assert kept[0][name] < kept[1][name] < kept[2][name]
    assert kept[0] != kept[1] == {g.name: g.kept for g in plain.groups}
    found = sc.RepairAware(factors={name: 100.0}).allocate(graph, scores, budget)
    assert found.settings["factors"] == {name: 100.0}
    assert "factors" not in plain.settings
    # What is predicted are the errors themselves.
    assert found.certificates["sum"] == pytest.approx(error(scores, found), rel=1e-3)


def test_an_error_to_stop_before() -> None:
    graph = chain(5, 9, 8, 7, 3)
    scores = convex(graph)
    whole = sum(float(np.sort(v)[-2]) for v in scores["reconstruction"].values())
    before = -1.0
    for share in (0.05, 0.2, 0.6):
        plan = sc.RepairAware(error=share * whole).allocate(graph, scores)
        assert before <= error(scores, plan) <= share * whole
        before = error(scores, plan)
    assert plan.settings["error"] == 0.6 * whole


def test_settings_are_checked() -> None:
    graph = chain(3, 4, 2)
    with pytest.raises(SettingError, match="either an error or a budget, got neither"):
        sc.RepairAware().allocate(graph, convex(graph))
    with pytest.raises(SettingError, match="either an error or a budget, got both"):
        sc.RepairAware(error=0.1).allocate(graph, convex(graph), sc.Budget(macs=0.5))
    with pytest.raises(SettingError, match="got one of 'x', which is no group"):
        sc.RepairAware(factors={"x": 2.0}).allocate(graph, convex(graph), sc.Budget(macs=0.5))
    for bad in ({"error": 0.0}, {"error": -1.0}, {"per": "latency"}, {"factors": {"x": 0.0}}):
        with pytest.raises(SettingError, match="RepairAware: expected"):
            sc.RepairAware(**bad)  # type: ignore[arg-type]


def test_the_whole_pipeline() -> None:
    data = [(torch.randn(16, 3, 8, 8),) for _ in range(4)]
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    ).eval()  # fmt: skip
    result = sc.prune(net, data, sc.Budget(macs=0.5), "repair_aware", repair="reconstruct", progress=False)
    assert result.plan.predicted.macs <= 0.5 * result.plan.dense.macs
    assert set(result.plan.certificates) >= {"error", "sum"}
