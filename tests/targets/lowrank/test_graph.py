"""What directions cost, and which goes first."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import secateur as sc
from secateur.allocators.registry import RULES
from secateur.targets.lowrank.factorise import factorise
from secateur.targets.lowrank.pair import most_directions
from secateur.targets.lowrank.saving import without_losses
from tests.targets.lowrank.models import LAYERS, MAPS, batches, rank_plan, several

LABELLED = [(x, torch.arange(6) % 5) for x in batches(4)]


def graph_of(granularity: Any = "rank") -> Any:
    return sc.trace(factorise(several(), batches(), progress=False), MAPS.double(), granularity=granularity)


def parameters(layer: nn.Module, rank: int) -> int:
    out, into = layer.weight.shape[:2]  # type: ignore[union-attr, index]
    bias = layer.bias is not None
    return int(rank * (out + into + bias) + out * bias)


def test_groups_begin_where_two_layers_save_something() -> None:
    model, graph = several(), graph_of()
    assert [group.name for group in graph.groups] == [f"{path}.first" for path in LAYERS]
    for path in LAYERS:
        layer = model.get_submodule(path)
        own = sum(p.numel() for p in layer.parameters())
        most = graph[f"{path}.first"].size - 1
        assert most == most_directions(layer)
        assert parameters(layer, most) < own <= parameters(layer, most + 1)


def test_costs_are_those_of_the_dense_model_and_of_each_rank() -> None:
    model, graph = several(), graph_of()
    dense = sc.trace(model, MAPS.double()).cost()
    assert graph.cost() == dense
    for path in LAYERS:
        layer, group = model.get_submodule(path), graph[f"{path}.first"]
        own = sum(p.numel() for p in layer.parameters())
        positions = {"wide": 4, "head": 1}.get(path, 4)
        for rank in range(1, group.size):
            keep = np.arange(group.size) < rank
            found = graph.cost({group.name: keep})
            assert found.params == dense.params - own + parameters(layer, rank)
            out, into = layer.weight.shape[:2]  # type: ignore[union-attr, index]
            assert found.macs == dense.macs - positions * (out * into - rank * (out + into))
    gone = {group.name: np.arange(group.size)[::-1] for group in graph.groups}
    params, macs = graph.sweep(gone, 3)
    for stage in range(3):
        cost = graph.cost({name: when > stage for name, when in gone.items()})
        assert (params[stage], macs[stage]) == (cost.params, cost.macs)


def test_with_units_costs_depend_on_both() -> None:
    graph = graph_of(["unit", "rank"])
    assert "up.second" in [group.name for group in graph.groups]
    keep = {"up.second": np.arange(24) < 20, "up.first": np.arange(graph["up.first"].size) < 5}
    small = sc.apply(graph.programs.model, sc.Plan.build(graph, keep, allocator="hand"))
    assert graph.cost(keep).params == sum(p.numel() for p in small.parameters())
    assert (small.up.rank, small.up.out_features, small.down.in_features) == (5, 20, 20)


def test_a_pair_that_costs_more_than_its_layer_is_put_back() -> None:
    """With 3 of 24 outputs left, a rank of 7 saves nothing any more."""
    graph = graph_of(["unit", "rank"])
    size = graph["up.first"].size
    keep = {"up.second": np.arange(24) < 3, "up.first": np.arange(size) < size - 1}
    plan = sc.Plan.build(graph, keep, allocator="hand")
    found = without_losses(graph, plan.on(sc.Uniform().curve(graph, sc.score(graph, None, "magnitude"))))
    assert found.ratios["up.first"] == 0
    assert found.ratios["up.second"] == plan.ratios["up.second"]
    assert found.predicted.params < plan.predicted.params
    fine = rank_plan(graph_of(), seed=1)
    assert without_losses(graph_of(), fine) is fine


@pytest.mark.parametrize("granularity", ["rank", ["unit", "rank"]])
@pytest.mark.parametrize("name", sorted(RULES.keys() - {"erk", "ratios", "repairability"}))
def test_every_rule_takes_the_weakest_directions_first(name: str, granularity: Any) -> None:
    graph: Any = graph_of(granularity)
    rule = RULES[name]
    scores = sc.score(graph, LABELLED, rule.signals, progress=False)
    plan = rule.allocate(graph, scores, sc.Budget(params=0.8))
    removed = [group for group in plan.groups if group.removed and group.name in graph.uncorrelated]
    assert removed or granularity != "rank"
    assert all(group.size - 1 in group.removed for group in removed)
    assert plan.predicted.params <= 0.8 * plan.dense.params


def test_errors_of_directions_are_those_of_the_outputs() -> None:
    """Of one layer whose outputs are the model's, the score is the error over the outputs' variance."""
    torch.manual_seed(0)
    layer = nn.Linear(10, 8).double()
    x = torch.randn(200, 10, dtype=torch.float64) @ torch.randn(10, 10, dtype=torch.float64)
    pairs: Any = factorise(nn.Sequential(layer, nn.Identity()), [x], progress=False)
    graph: Any = sc.trace(pairs, x[:2], granularity="rank")
    (values,) = sc.score(graph, [x], "reconstruction", progress=False)["reconstruction"].values()
    y = layer(x).detach()
    variance = (y - y.mean(0)).square().sum()
    most = len(values) - 1
    order = [most, *range(most)[::-1]]
    assert np.argsort(values).tolist() == order
    for gone, unit in enumerate(order):
        rank = most - gone
        inner = pairs[0][0](x).detach().clone()
        inner[:, rank:] = 0
        error = (pairs[0][1](inner).detach() - y).square().sum() / variance
        assert values[unit] == pytest.approx(float(error), rel=1e-6)


def test_a_dense_model_is_traced_by_its_weights_alone() -> None:
    graph: Any = sc.trace(several(), MAPS.double(), granularity="rank")
    assert [group.name for group in graph.groups] == [f"{path}.first" for path in LAYERS]
    plan = sc.Uniform(ratio=0.25).allocate(graph, sc.score(graph, None, "magnitude"))
    small = sc.apply(graph.programs.model, plan)
    assert sc.verify(graph.programs.model, small, plan).proven  # type: ignore[union-attr]


def test_layers_that_stay_one_are_listed_with_the_reason() -> None:
    model: Any = several()
    model.head = nn.Linear(12, 1).double()
    graph: Any = sc.trace(factorise(model, batches(), progress=False), MAPS.double(), granularity="rank")
    assert {left.group.name: left.reason for left in graph.left} == {
        "head": "it is too small for two layers to save anything"
    }
    assert "kept: head" in str(graph)
    with pytest.raises(sc.NothingToPruneError, match="factorise: expected"):
        sc.trace(nn.Sequential(nn.Linear(3, 1)), torch.ones(2, 3), granularity="rank")  # type: ignore[call-overload]


class Reads(nn.Module):
    """It takes the norm of one layer's weight, and the dtype of another's."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 24), nn.Linear(24, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.up(x)).to(self.down.weight.dtype)
        found: torch.Tensor = self.down(x) * self.up.weight.norm()
        return found


@pytest.mark.parametrize("granularity", ["rank", ["unit", "rank"]])
def test_layers_whose_weight_is_read_cost_what_they_cost(granularity: Any) -> None:
    torch.manual_seed(0)
    model, data = Reads().eval(), [torch.randn(8, 12)]
    pairs = factorise(model, data, progress=False)
    graph = sc.trace(pairs, data[0], granularity=granularity)
    assert graph.cost().params == sum(p.numel() for p in model.parameters())
    assert graph.cost().macs == 2 * 12 * 24
    assert {left.group.name for left in graph.left} == {"up"}
    plan = rank_plan(graph)
    small = sc.apply(pairs, plan)
    assert sum(p.numel() for p in small.parameters()) == plan.predicted.params
    assert sc.verify(pairs, small, plan).proven
    result = sc.prune(model, data, sc.Budget(macs=0.8), "uniform", granularity, progress=False)
    assert sum(p.numel() for p in result.model.parameters()) == result.plan.predicted.params
