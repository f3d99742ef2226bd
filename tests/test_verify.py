"""The proof: passes for what is right, and fails for what is not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import secateur as sc
from tests.apply.plans import plan_of, random_plan
from tests.apply.test_equality import dense, traced
from tests.graph.test_trace import assert_same, state_of
from tests.graph.tiny import Calls
from tests.models import INEXACT, TOPOLOGIES, build


@pytest.mark.parametrize("form", ["module", "graph", "masked"])
@pytest.mark.parametrize(
    "name", ["residual", "concat", "lstm_two_layers", "dict_output", "multi_input", "tied_linear"]
)
def test_what_is_right_passes(name: str, form: str) -> None:
    model, graph = dense(name), traced(name)
    plan = random_plan(graph)
    small = sc.apply(model, plan, form, graph=graph)
    for inputs in (None, TOPOLOGIES[name].inputs(4, torch.float64, seed=2)):
        proof = sc.verify(model, small, plan, inputs)
        assert 0 <= proof.difference <= proof.tolerance == 1e-9
        assert proof.reference == "masked"
        assert proof.outputs == (2 if name == "dict_output" else 1)


def test_in_float64_whatever_the_model_is() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = build("residual", dtype)
        graph = sc.trace(model, TOPOLOGIES["residual"].inputs(3, dtype))
        plan = random_plan(graph)
        for form in ("module", "graph"):
            small = sc.apply(model, plan, form, graph=graph)
            assert sc.verify(model, small, plan).difference <= 1e-9
            assert next(small.parameters()).dtype == dtype


def test_neither_model_is_changed() -> None:
    model, graph = build("residual"), traced("residual")
    plan = random_plan(graph)
    small = sc.apply(model.train(), plan, "module", graph=graph)
    before = state_of(model), state_of(small)
    sc.verify(model, small, plan)
    assert_same(before[0], state_of(model))
    assert_same(before[1], state_of(small))


@pytest.mark.parametrize("form", ["module", "graph"])
def test_one_changed_weight_fails(form: str) -> None:
    model, graph = dense("residual"), traced("residual")
    plan = random_plan(graph)
    small = sc.apply(model, plan, form, graph=graph)
    with torch.no_grad():
        small.get_parameter("stem.0.weight")[0, 1, 1, 1] += 1e-6
    with pytest.raises(
        sc.VerificationError, match=r"expected the pruned Residual to equal the masked dense one to 1e-09"
    ):
        sc.verify(model, small, plan)
    assert sc.verify(model, small, plan, tolerance=1e-3).tolerance == 1e-3


def test_a_wrong_unit_fails() -> None:
    model, graph = dense("plain"), traced("plain")
    right, wrong = (plan_of(graph, {"2": np.arange(9) != gone}) for gone in (3, 4))
    with pytest.raises(sc.VerificationError, match="verify"):
        sc.verify(model, sc.apply(model, wrong, graph=graph), right)


def test_the_dense_model_fails() -> None:
    model, graph = dense("plain"), traced("plain")
    with pytest.raises(sc.VerificationError):
        sc.verify(model, model, random_plan(graph))


def test_other_outputs_and_nan_fail() -> None:
    model, graph = dense("dict_output"), traced("dict_output")
    plan = random_plan(graph)
    small = sc.apply(model, plan, graph=graph)
    inputs = TOPOLOGIES["dict_output"].inputs(2, torch.float64)
    fewer = Calls(lambda m, x: m.small(x)["logits"], small=small)
    with pytest.raises(sc.VerificationError, match="got inf"):
        sc.verify(model, fewer, plan, inputs)
    nan = Calls(lambda m, x: {k: v * torch.nan for k, v in m.small(x).items()}, small=small)
    with pytest.raises(sc.VerificationError):
        sc.verify(model, nan, plan, inputs)


def test_outputs_that_are_whole_numbers_are_compared_too() -> None:
    model = Calls(lambda m, x: m.b(m.a(x).relu()).argmax(-1), a=nn.Linear(3, 16), b=nn.Linear(16, 9)).double()
    x = torch.randn(200, 3, dtype=torch.float64)
    graph = sc.trace(model, x)
    plan = random_plan(graph)
    small = sc.apply(model, plan, graph=graph)
    assert sc.verify(model, small, plan, x).outputs == 1
    with torch.no_grad():
        small.b.bias.add_(torch.randn(9, dtype=torch.float64))
    with pytest.raises(sc.VerificationError):
        sc.verify(model, small, plan, x)


@pytest.mark.parametrize("name", sorted(INEXACT))
def test_inexact_plans_are_compared_with_the_program(name: str) -> None:
    """Masking zeroes what reads a unit, which is not what a norm over fewer units computes."""
    model, graph = dense(name), traced(name, allow_inexact=True)
    plan = random_plan(graph)
    exact = all(g.exact for g in graph.groups)
    proof = sc.verify(model, sc.apply(model, plan, graph=graph), plan)
    assert proof.reference == ("masked" if exact else "graph")
    assert proof.difference <= 1e-9


def test_an_inexact_group_that_loses_nothing_leaves_the_plan_exact() -> None:
    model, graph = dense("layer_norm"), traced("layer_norm", allow_inexact=True)
    plan = plan_of(graph, {"3": np.arange(9) > 3})
    assert sc.verify(model, sc.apply(model, plan, graph=graph), plan).reference == "masked"


def test_a_plan_for_another_model() -> None:
    with pytest.raises(sc.PlanError, match="expected the model it was made for"):
        sc.verify(dense("gated"), dense("gated"), random_plan(traced("mlp")))


def test_wrapped_models_and_mappings() -> None:
    model, graph = dense("multi_input"), traced("multi_input")
    plan = random_plan(graph)
    small = sc.apply(model, plan, "module", graph=graph)
    image, vector = TOPOLOGIES["multi_input"].inputs(2, torch.float64)
    proof = sc.verify(nn.DataParallel(model), small, plan, {"vector": vector, "image": image})
    assert proof.difference <= 1e-9
