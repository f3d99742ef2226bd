"""Factors of groups that are measured part by part on pruned and repaired models."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import secateur as sc
from secateur.calibration import Calibration
from secateur.errors import SettingError
from secateur.pipeline.auto import depth
from secateur.pipeline.targets.target import Task
from secateur.pipeline.targets.units import Units
from secateur.repairs.judging import Judge


def deep(layers: int = 5, width: int = 12) -> nn.Module:
    torch.manual_seed(0)
    parts: list[nn.Module] = [nn.Linear(6, width), nn.Tanh()]
    for _ in range(layers - 2):
        parts += [nn.Linear(width, width), nn.Tanh()]
    return nn.Sequential(*parts, nn.Linear(width, 3)).eval()


def given(size: int = 20) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 6, generator=generator) for _ in range(10)]


def target_of(model: nn.Module) -> Units:
    """With so few samples that each repair reads all of them."""
    return Units(Task(model, Calibration.of(given(8)), repair="reconstruct"))


def test_factors_are_measured_distances_over_predicted_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a loop over models in which one group alone is pruned and the layers after it are refitted."""
    monkeypatch.setattr(depth, "FARTHEST", math.inf)
    model = deep()
    target = target_of(model)
    scores = target.score([sc.RepairAware()])
    names = [group.name for group in target.graph.groups]
    rule = target.with_measurements(sc.RepairAware(parts=len(names)), target.task.fit, scores)
    graph = target.graph
    with pytest.raises(sc.UnreachableBudgetError) as least:
        sc.RepairAware().allocate(graph, scores, sc.Budget(macs=1e-6))
    plan = sc.RepairAware().allocate(graph, scores, sc.Budget(macs=(1 + least.value.smallest) / 2))
    assert all(group.removed for group in plan.groups), "the case needs all groups to lose units"
    judge = Judge(model, target.task.held)
    ratios = []
    for name in names:
        alone = sc.Plan.build(graph, {name: plan.keep[name]}, allocator="by hand")
        small = target.candidate(alone, target.task.fit)
        ratios.append(float(judge(small).mean()) / plan.certificates["error"][name])
    wanted = np.log(ratios) - np.mean(np.log(ratios))
    found = [math.log(rule.factors[name]) for name in names]
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert np.ptp(wanted) > 1, "the case needs factors that differ"


def test_factors_are_in_the_plan_and_make_it_again() -> None:
    """Two parts give a straight line over depth."""
    rule = sc.RepairAware(parts=2)
    result = sc.prune(
        deep(), given(), sc.Budget(macs=0.6), rule, "unit", "reconstruct",
        measure_latency=False, progress=False,
    )  # fmt: skip
    factors = result.plan.settings["factors"]
    assert set(factors) == {group.name for group in result.graph.groups}
    assert np.log(list(factors.values())).sum() == pytest.approx(0, abs=1e-9)
    again = sc.RepairAware(factors=factors).allocate(result.graph, result.scores, sc.Budget(macs=0.6))
    assert again.groups == result.plan.groups
    values = [factors[group.name] for group in result.graph.groups]
    steps = np.diff(np.log(values))
    np.testing.assert_allclose(steps, steps[0])
    assert abs(steps[0]) > 0.1


def test_factors_that_were_given_stay_beside_those_measured() -> None:
    target = target_of(deep())
    scores = target.score([sc.RepairAware()])
    plain = target.with_measurements(sc.RepairAware(parts=3), target.task.fit, scores)
    name = target.graph.groups[0].name
    # So small a change leaves the plan, and with it what is measured, as it was.
    other = target.with_measurements(
        sc.RepairAware(parts=3, factors={name: 1 + 1e-9}), target.task.fit, scores
    )
    assert other.factors[name] == pytest.approx((1 + 1e-9) * plain.factors[name], rel=1e-12)


def test_one_group_needs_no_factors() -> None:
    """Nothing can be moved, so nothing is measured."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    target = target_of(model)
    scores = target.score([sc.RepairAware()])
    assert target.with_measurements(sc.RepairAware(parts=4), target.task.fit, scores) == sc.RepairAware()


def test_only_within_the_limits() -> None:
    """A group that must stay whole is part of no measured model."""
    model = deep()
    first = next(iter(sc.trace(model, given()[0]).groups)).name
    result = sc.prune(
        model, given(), sc.Budget(macs=0.7), sc.RepairAware(parts=4), "unit", "reconstruct",
        limits=sc.Limits(ignore=(first,)), measure_latency=False, progress=False,
    )  # fmt: skip
    assert next(group for group in result.plan.groups if group.name == first).removed == ()
    assert len(result.plan.settings["factors"]) == len(result.graph.groups)


def test_what_is_refused() -> None:
    model = deep()
    graph = sc.trace(model, given()[0])
    scores = sc.score(graph, given(), "reconstruction", progress=False)
    with pytest.raises(SettingError, match="which measure them"):
        sc.RepairAware(parts=4).allocate(graph, scores, sc.Budget(macs=0.5))
    for wrong in (1, -1, 2.0, True):
        with pytest.raises(SettingError, match="parts"):
            sc.RepairAware(parts=wrong)  # type: ignore[arg-type]


def test_the_same_plan_from_the_same_seed_and_from_compare() -> None:
    model = deep()
    budget = sc.Budget(macs=0.5)

    def plan() -> sc.Plan:
        return sc.prune(
            model, given(), budget, sc.RepairAware(parts=3), "unit", "reconstruct",
            measure_latency=False, progress=False,
        ).plan  # fmt: skip

    one = plan()
    assert one.to_json() == plan().to_json()
    table = sc.compare(
        model, given(), {"by depth": sc.RepairAware(parts=3)}, [budget],
        repair="reconstruct", progress=False,
    )  # fmt: skip
    assert table.outcomes[0].cost == one.predicted


def test_no_factor_is_far_from_the_typical_one() -> None:
    """A part that is measured to be almost free must not lose all that it has."""
    target = target_of(deep())
    scores = target.score([sc.RepairAware()])
    found = target.with_measurements(sc.RepairAware(parts=4), target.task.fit, scores).factors.values()
    assert max(found) / min(found) <= depth.FARTHEST**2
    assert min(found) < np.median(list(found)) / 8, "the case needs a part that is almost free"
