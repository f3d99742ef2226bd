"""The rules on a graph that the engine traced."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from secateur.allocators import Budget, Limits, ToD, Uniform
from secateur.errors import PlanError
from secateur.graph.graph import Graph
from secateur.graph.trace import trace
from secateur.plan import CostRecord, Plan


class Net(nn.Module):
    """A residual stream, batch norm, and a flatten: several positions for each unit."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.inner = nn.Conv2d(16, 24, 3, padding=1)
        self.norm = nn.BatchNorm2d(24)
        self.back = nn.Conv2d(24, 16, 3, padding=1)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.head = nn.Linear(16 * 4, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = x + self.back(torch.relu(self.norm(self.inner(x))))
        return self.head(self.pool(x).flatten(1))


@pytest.fixture(scope="module")
def graph() -> Graph:
    return trace(Net(), torch.zeros(2, 3, 8, 8))


@pytest.mark.parametrize("rule", [ToD, Uniform])
def test_the_curve_of_a_traced_model_is_exact(graph: Graph, rule: type[ToD] | type[Uniform]) -> None:
    rng = np.random.default_rng(1)
    signals = ("wasserstein", "taylor", "magnitude")
    scores = {signal: {g.name: rng.uniform(size=g.size) for g in graph.groups} for signal in signals}
    curve = rule().curve(graph, scores)
    assert len(curve) > 20
    for i in range(1, len(curve)):
        plan = rule(float(curve.knob[i])).allocate(graph, scores)
        assert plan.predicted == CostRecord(params=int(curve.params[i]), macs=int(curve.macs[i]))
        assert {g.name: g.kept for g in plan.groups} == dict(zip(curve.groups, curve.kept[i], strict=True))


def test_a_sweep_of_many_stages_is_the_cost_at_each(graph: Graph) -> None:
    rng = np.random.default_rng(2)
    stages = 1200  # more than are evaluated together
    gone = {g.name: rng.integers(0, stages + 100, g.size) for g in graph.groups}
    params, macs = graph.sweep(gone, stages)
    for stage in [*range(0, stages, 37), 511, 512, stages - 1]:
        cost = graph.cost({name: when > stage for name, when in gone.items()})
        assert (cost.params, cost.macs) == (params[stage], macs[stage])
    with pytest.raises(PlanError, match="prunable groups"):
        graph.sweep({"nothing": np.zeros(3, dtype=np.int64)}, 2)


@pytest.mark.parametrize("allocator", [ToD(), Uniform()])
@pytest.mark.parametrize("budget", [Budget(macs=0.75), Budget(macs=0.4, params=0.5)])
def test_a_budget_on_a_traced_model(graph: Graph, allocator: ToD | Uniform, budget: Budget) -> None:
    rng = np.random.default_rng(0)
    signals = ("wasserstein", "taylor", "magnitude")
    scores = {signal: {g.name: rng.uniform(size=g.size) for g in graph.groups} for signal in signals}
    plan = allocator.allocate(graph, scores, budget=budget, limits=Limits(round_to=2))
    assert budget.met(graph.cost(plan.keep), graph.cost())
    assert plan.predicted == CostRecord.of(graph.cost(plan.keep))
    assert all(group.kept % 2 == 0 for group in plan.groups)
    assert Plan.from_json(plan.to_json()) == plan
    plan.check(graph.fingerprint)

    stream = next(group for group in plan.groups if group.size == 16)
    head = next(s for s in stream.slices if s.tensor == "head.weight")
    assert head.axis == 1
    assert head.removed == tuple(4 * unit + i for unit in stream.removed for i in range(4))
    assert {s.tensor for s in stream.slices} >= {"stem.weight", "back.weight", "back.bias", "inner.weight"}
