"""Two rounds composed are one plan for the dense model that gives the very same smaller model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import secateur as sc
from secateur.errors import NothingToPruneError
from secateur.targets.units.composing import compose, split
from secateur.targets.units.record import Record, attach
from tests.helpers.models import INEXACT, TOPOLOGIES, build
from tests.targets.units.plans import plan_of, random_plan
from tests.zoo.transformers_models import MODELS


def twice(dense: nn.Module, inputs: Any) -> tuple[nn.Module, Record]:
    """What two rounds of random removal leave, and their composition."""
    small, record = dense, None
    for seed in (0, 1):
        graph = sc.trace(small, inputs)
        keep = random_plan(graph, 0.25, seed).keep
        apart = () if record is None else split(graph.groups, record.plan)
        plan = plan_of(graph, {n: mask for n, mask in keep.items() if n not in apart})
        small = sc.apply(small, plan, "auto", graph=graph, example_inputs=inputs, on_unrealisable="leave")
        now = sc.record_of(small)
        record = now if record is None else compose(record, now)
    assert record is not None
    return small, record


def check(dense: nn.Module, inputs: Any, name: str) -> None:
    try:
        small, record = twice(dense, inputs)
    except NothingToPruneError:
        pytest.skip(f"nothing is left to prune of {name} in a second round")
    plan = sc.Plan.from_json(record.plan.to_json())
    assert plan == record.plan
    sc.verify(dense, attach(small, record), plan, inputs)
    at_once = sc.apply(dense, plan, "module", example_inputs=inputs)
    for key, tensor in at_once.state_dict().items():
        assert torch.equal(tensor, small.state_dict()[key]), key
    cost = sc.trace(dense, inputs).cost(plan.keep)
    assert (cost.params, cost.macs) == (plan.predicted.params, plan.predicted.macs)


QUICK = ("residual", "grouped", "concat", "tied_linear")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in TOPOLOGIES if n not in INEXACT],
)
def test_topologies(name: str) -> None:
    check(build(name), TOPOLOGIES[name].inputs(2, torch.float64), name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "bert", "gpt2", "qwen2", "t5"])
def test_transformers(name: str) -> None:
    entry = next((e for e in MODELS if e.name == name), None)
    if entry is None or not entry.available():
        pytest.skip(f"transformers with {name} is not installed")
    check(entry.construct().double().eval(), entry.example(2, torch.Generator().manual_seed(0)), name)


def test_positions_count_from_the_dense_model() -> None:
    """Units 0 and 3 of 6 go first, then 1 and 2 of the 4 that are left: 2 and 4 of all."""
    net = nn.Sequential(nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 2)).double().eval()
    records = []
    for gone in ([0, 3], [1, 2]):
        graph = sc.trace(net, torch.zeros(2, 2, dtype=torch.float64))
        (group,) = graph.groups
        keep = torch.ones(group.size, dtype=torch.bool)
        keep[gone] = False
        net = sc.apply(net, sc.Plan.build(graph, {group.name: keep.numpy()}, allocator="hand"))  # type: ignore[assignment]
        records.append(sc.record_of(net))
    (both,) = compose(*records).plan.groups
    assert both.removed == (0, 2, 3, 4)
    assert (both.size, both.kept) == (6, 2)
    assert {s.removed for s in both.slices} == {(0, 2, 3, 4)}


def test_units_that_the_dense_model_holds_together_stay_together() -> None:
    """With one block of two left, its channels could go one by one; no plan for the dense can say so."""
    dense, x = build("grouped"), TOPOLOGIES["grouped"].inputs(2, torch.float64)
    graph = sc.trace(dense, x)
    small = sc.apply(dense, plan_of(graph, {"0.0": np.array([True, False])}), graph=graph)
    record = sc.record_of(small)
    finer = sc.trace(small, x)
    assert split(finer.groups, record.plan) == ("0.0", "1.0")
    plan = plan_of(finer, {"0.0": np.arange(finer["0.0"].size) > 0})
    then = sc.record_of(sc.apply(small, plan, graph=finer))
    with pytest.raises(
        sc.PlanError, match=r"got group '0\.0', whose units are others\. Leave this group whole"
    ):
        compose(record, then)
