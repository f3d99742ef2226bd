from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import secateur as sc
from secateur.integrations import GradualPruner, Schedule, read_shape, reshape, shape_state, write_shape
from tests.graph.test_trace import assert_same, state_of
from tests.helpers.models import TOPOLOGIES, build
from tests.integrations.training import a_pruner, batches, network, step
from tests.targets.blocks.models import make
from tests.targets.units.module_form.test_mendrules import CASES


def pruned(rounds: int = 2) -> nn.Module:
    model, pruner = network(), a_pruner(rounds=2, end=2)
    for number in range(1, rounds + 1):
        pruner.advance(model, step=number)
    return model


def test_training_that_is_interrupted_goes_on_as_if_it_was_not() -> None:
    """Through a checkpoint between two rounds, bit for bit."""

    def run(model: nn.Module, optimizer: Any, pruner: Any, first: int, last: int) -> None:
        for number in range(first, last + 1):
            step(model, optimizer, batches()[number % 4])
            pruner.advance(model, optimizer, step=number)

    whole = network()
    run(whole, torch.optim.Adam(whole.parameters()), a_pruner(end=6), 1, 8)
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    run(model, optimizer, a_pruner(end=6), 1, 4)
    file = io.BytesIO()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "shape": shape_state(model)}
    torch.save(state, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    fresh = network()
    with pytest.raises(RuntimeError, match="size mismatch"):
        network().load_state_dict(state["model"])
    reshape(fresh, state["shape"])
    fresh.load_state_dict(state["model"])
    optimizer = torch.optim.Adam(fresh.parameters())
    optimizer.load_state_dict(state["optimizer"])
    run(fresh, optimizer, a_pruner(end=6), 5, 8)
    assert sc.record_of(fresh) == sc.record_of(whole)
    assert sc.record_of(fresh).plan.settings["rounds"] == 2
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, fresh.state_dict()[name]), name


@pytest.mark.parametrize("name", ["residual", "lstm_bidirectional", "hard_coded_view", "concat"])
def test_topologies(name: str) -> None:
    """The attributes too: the reshaped model runs, and computes the same once it has the same values."""
    inputs = TOPOLOGIES[name].inputs(4, torch.float64)
    model = build(name)
    output = model(*inputs)
    classes = output.shape[-1] if torch.is_tensor(output) else 1
    data = [(inputs if len(inputs) > 1 else inputs[0], torch.arange(4) % classes)]
    pruner = GradualPruner(
        Schedule(sc.Budget(params=0.6), 0, 2, rounds=2), data, sc.Uniform(removal="magnitude")
    )
    for number in (1, 2):
        pruner.advance(model, step=number)
    fresh = build(name, seed=1)
    reshape(fresh, json.loads(json.dumps(shape_state(model))))
    assert [str(m) for m in fresh.modules()] == [str(m) for m in model.modules()]
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(*inputs), model(*inputs))
    assert sc.record_of(fresh) == sc.record_of(model)


@pytest.mark.parametrize("name", ["attention", "windows"])
def test_submodules_that_run_as_captured(name: str) -> None:
    make, shape, captured = CASES[name]
    torch.manual_seed(0)
    model, x = make().double().eval(), torch.randn(shape, dtype=torch.float64)
    start, fresh = copy.deepcopy(model), copy.deepcopy(model)
    rule = sc.Uniform(removal="magnitude")
    pruner = GradualPruner(Schedule(sc.Budget(params=0.7), 0, 2, rounds=2), [x], rule)
    for number in (1, 2):
        pruner.advance(model, step=number)
    record = sc.record_of(model)
    assert {path[: len("blocks.0")] for path in captured} <= {
        path[: len("blocks.0")] for path in record.captured
    }
    sc.verify(start, model, record.plan, x)
    reshape(fresh, shape_state(model))
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(fresh(x), model(x), rtol=1e-12, atol=1e-12)


def test_a_dense_model_has_no_shapes_of_its_own() -> None:
    model = network()
    assert shape_state(model) == {}
    before = state_of(model)
    reshape(model, {})
    assert_same(before, state_of(model))


def test_a_model_that_has_the_shapes_already() -> None:
    model = pruned()
    state = shape_state(model)
    before = state_of(model)
    reshape(model, state)
    assert_same(before, state_of(model))
    unmarked = network()
    reshape(unmarked, state)
    object.__delattr__(unmarked, "_secateur_record")
    reshape(unmarked, state)  # as a model is that from_pretrained made from the pruned configuration
    assert sc.record_of(unmarked) == sc.record_of(model)


def test_what_does_not_belong_together_is_refused() -> None:
    once, twice = pruned(1), pruned(2)
    with pytest.raises(sc.ArtefactError, match=r"the model it was made for .* made anew"):
        reshape(nn.Sequential(nn.Linear(2, 2)), shape_state(once))
    with pytest.raises(sc.ArtefactError, match="goes on from the dense model, made anew"):
        reshape(twice, shape_state(once))
    with pytest.raises(sc.ArtefactError, match="expected a dense model, as the checkpoint holds one"):
        reshape(once, {})
    state = shape_state(once)
    with pytest.raises(sc.ArtefactError, match="expected format 1 or older, got 2, which a newer"):
        reshape(network(), state | {"format": 2})
    with pytest.raises(sc.ArtefactError, match=r"expected what shape_state returned, got .* \(in plan\)"):
        reshape(network(), {k: v for k, v in state.items() if k != "plan"})
    with pytest.raises(sc.ArtefactError, match="reshape: plan: "):
        reshape(network(), state | {"plan": state["plan"] | {"groups": 3}})


def test_files(tmp_path: Path) -> None:
    model = pruned()
    assert read_shape(tmp_path) == {}
    path = write_shape(model, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name] == ["pruning.json"]
    assert read_shape(tmp_path) == shape_state(model)
    for text in ("{", "[]"):
        path.write_text(text)
        with pytest.raises(sc.ArtefactError, match=r"pruning\.json: expected .* Take another"):
            read_shape(tmp_path)


@pytest.mark.parametrize("granularity", ["block", ["unit", "block"]])
def test_dropped_blocks_are_no_matter_of_shapes(granularity: Any) -> None:
    model, inputs = make("chain")
    graph: Any = sc.trace(model, inputs, granularity=granularity)
    plan = sc.Plan.build(graph, {"blocks": np.array([True, False, True, True])}, allocator="by hand")
    small = sc.apply(model, plan, graph=graph)
    with pytest.raises(sc.ArtefactError, match=r"shape_state: .* that drops blocks\.1"):
        shape_state(small)
    state = {"format": 1, "fingerprint": "", "plan": json.loads(plan.to_json()), "note": ""}
    with pytest.raises(sc.ArtefactError, match=r"reshape: .* that drops blocks\.1"):
        reshape(make("chain")[0], {**state, "sizes": {}, "captured": []})
