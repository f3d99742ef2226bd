"""The core of the library: what was removed computes what the masked dense model computes."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import secateur as sc
from secateur.targets.units.compare import relative_difference, run
from tests.helpers.models import HARD_CODED, INEXACT, TOPOLOGIES
from tests.helpers.traces import applier, dense, traced
from tests.targets.units.plans import keeps, plan_of, random_plan

FOLLOWS_ANY_PLAN = sorted(set(TOPOLOGIES) - HARD_CODED - {"channel_shuffle"})
"""Their code reads sizes from tensors; `channel_shuffle` follows plans that take alike from both halves."""

RUN = (1, 2, 5)
"""Batch sizes: a captured program must not have learnt the one it was traced with."""


def outputs(model: torch.nn.Module, name: str, batch: int) -> list[torch.Tensor]:
    return run(model, TOPOLOGIES[name].inputs(batch, torch.float64, seed=1), {})


@pytest.mark.parametrize("name", TOPOLOGIES)
@settings(max_examples=8, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_pruned_equals_masked(name: str, data: st.DataObject) -> None:
    graph, apply = traced(name), applier(name)
    plan = plan_of(graph, data.draw(keeps(graph)))
    batch = data.draw(st.sampled_from(RUN))
    wanted = outputs(apply(plan, "masked"), name, batch)
    assert relative_difference(outputs(apply(plan, "graph"), name, batch), wanted) <= 1e-9
    either = apply(plan)
    assert relative_difference(outputs(either, name, batch), wanted) <= 1e-9
    if name in FOLLOWS_ANY_PLAN:
        assert sc.record_of(either).form == "module"


@pytest.mark.parametrize("name", sorted(INEXACT))
@settings(max_examples=8, derandomize=True)
@given(data=st.data())
def test_module_equals_graph_where_an_operator_mixes_units(name: str, data: st.DataObject) -> None:
    graph, apply = traced(name, allow_inexact=True), applier(name, allow_inexact=True)
    plan = plan_of(graph, data.draw(keeps(graph)))
    sliced, module = apply(plan, "graph"), apply(plan, "module")
    assert relative_difference(outputs(module, name, 2), outputs(sliced, name, 2)) <= 1e-9


@pytest.mark.parametrize("form", ["module", "graph", "masked"])
@pytest.mark.parametrize("name", TOPOLOGIES)
def test_removing_nothing_is_the_identity(name: str, form: Literal["module", "graph", "masked"]) -> None:
    same = applier(name)(plan_of(traced(name), {}), form)
    for ours, theirs in zip(outputs(same, name, 2), outputs(dense(name), name, 2), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_masking_removes_something(name: str) -> None:
    """The reference itself is not the dense model, so that the comparisons above mean something."""
    model, graph = dense(name), traced(name)
    wanted = outputs(sc.apply(model, random_plan(graph), "masked"), name, 2)
    assert relative_difference(outputs(model, name, 2), wanted) > 1e-3


@pytest.mark.parametrize("name", ["residual", "mlp", "separable", "conv1d", "lstm"])
def test_both_forms_train_alike(name: str) -> None:
    """Batch norm, dropout and gradients: `train()` means the same for the program as for the module."""
    apply, plan = applier(name), random_plan(traced(name))
    module, program = apply(plan, "module"), apply(plan, "graph")
    inputs = TOPOLOGIES[name].inputs(6, torch.float64, seed=1)
    results = []
    for small in (module, program):
        small.train()
        torch.manual_seed(0)
        out = small(*inputs)
        out.square().sum().backward()
        results.append(out.detach())
    assert relative_difference(results[:1], results[1:]) <= 1e-9
    mine, theirs = dict(module.named_parameters()), dict(program.named_parameters())
    assert mine.keys() == theirs.keys()
    for parameter in mine:
        assert mine[parameter].grad is not None
        assert relative_difference([mine[parameter].grad], [theirs[parameter].grad]) <= 1e-9
    mine, theirs = module.state_dict(), program.state_dict()
    assert mine.keys() == theirs.keys()
    for key in mine:
        torch.testing.assert_close(mine[key], theirs[key], rtol=1e-9, atol=0)
