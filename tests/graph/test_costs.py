"""The cost model: what any choice of units costs, without making the model."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import secateur as sc
from secateur.graph.costs import CostModel
from tests.helpers.models import TOPOLOGIES
from tests.helpers.traces import applier, dense, traced
from tests.targets.units.plans import keeps, plan_of

UNCOUNTED = {"unknown_operator"}
"""`FlopCounterMode` refuses its complex numbers."""


def counted(model: nn.Module, name: str) -> sc.Cost:
    """Parameters by `numel`, and MACs as half of what PyTorch counts for one sample."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*TOPOLOGIES[name].inputs(1, torch.float64))
    return sc.Cost(sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2)


@pytest.mark.parametrize("name", sorted(set(TOPOLOGIES) - UNCOUNTED))
def test_the_dense_model(name: str) -> None:
    assert traced(name).cost() == counted(dense(name), name)


@pytest.mark.parametrize("name", sorted(set(TOPOLOGIES) - UNCOUNTED))
@settings(max_examples=5, derandomize=True)
@given(data=st.data())
def test_any_plan_costs_what_the_pruned_model_does(name: str, data: st.DataObject) -> None:
    graph = traced(name)
    keep = data.draw(keeps(graph))
    plan = plan_of(graph, keep)
    assert (plan.predicted.params, plan.predicted.macs) == (graph.cost(keep).params, graph.cost(keep).macs)
    assert graph.cost(keep) == counted(applier(name)(plan), name)


PROGRAMS = frozenset({"residual", "gated", "grouped", "lstm", "tied_linear", "channel_shuffle"})
"""Those whose captured program is counted by `make test` too: capturing it takes most of the time."""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in PROGRAMS else pytest.mark.slow)
        for name in sorted(set(TOPOLOGIES) - UNCOUNTED)
    ],
)
@settings(max_examples=5, derandomize=True)
@given(data=st.data())
def test_any_plan_costs_what_the_captured_program_does(name: str, data: st.DataObject) -> None:
    graph = traced(name)
    keep = data.draw(keeps(graph))
    assert graph.cost(keep) == counted(applier(name)(plan_of(graph, keep), "graph"), name)


def test_a_pruned_model_traces_to_its_own_cost() -> None:
    graph = traced("residual")
    plan = plan_of(graph, {g.name: [i % 3 > 0 for i in range(g.size)] for g in graph.groups})
    small = sc.apply(dense("residual"), plan, "module", graph=graph)
    again = sc.trace(small, TOPOLOGIES["residual"].inputs(3, torch.float64))
    assert again.cost() == graph.cost(plan.keep)
    assert [g.size for g in again.groups] == [g.kept for g in plan.groups]


def test_tied_parameters_are_counted_once() -> None:
    net = nn.Sequential(
        nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 2)
    )
    net[2].weight = net[0].weight
    with pytest.raises(sc.NothingToPruneError):  # the first layer reads the input
        sc.trace(net, torch.zeros(2, 4))
    graph = sc.trace(nn.Sequential(nn.Linear(3, 4), *net), torch.zeros(2, 3))
    assert graph.cost().params == 12 + 4 + 16 + 8 + 2
    assert graph.cost().macs == 12 + 16 + 16 + 8


def test_the_sum_of_products_by_hand() -> None:
    import numpy as np

    model = CostModel(slots=3, batch=2)
    two, all_three, fixed = (model.axis(np.array(s)) for s in ([0, 1], [0, 1, 2, -1], [-1, -1]))
    assert model.axis(np.array([0, 1])) == two
    model.add("params", 1, [two, all_three])
    model.add("params", 5, [])
    model.add("macs", 6, [two, fixed])
    assert model.cost(np.ones(3, bool)) == sc.Cost(params=2 * 4 + 5, macs=6 * 2 * 2 // 2)
    assert model.cost(np.array([True, False, False])) == sc.Cost(params=1 * 2 + 5, macs=6 * 1 * 2 // 2)
    model.add("params", 1, [fixed])
    assert model.cost(np.ones(3, bool)).params == 2 * 4 + 5 + 2
