"""The refitted down-projections solve the ridge problem that the docstring states."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import secateur as sc
from secateur.experts import repair as room
from secateur.experts.apply import apply_experts
from secateur.experts.down import inputs_of
from secateur.experts.repair import repair_experts
from secateur.experts.routing import watching
from secateur.experts.trace import trace_experts
from tests.experts.models import FAMILIES, Mixture, PlainLM, make, words
from tests.experts.test_apply import logits, masks, plan_of


def pruned(family: str) -> tuple[nn.Module, nn.Module, Any]:
    model = make(family)
    graph = trace_experts(model, words())
    return model, apply_experts(model, plan_of(graph, masks(graph, seed=4)), graph=graph), graph


@pytest.mark.parametrize("family", FAMILIES)
def test_what_goes_into_the_down_projections_gives_the_experts_outputs(family: str) -> None:
    model = make(family)
    graph = trace_experts(model, words())
    block = graph.blocks[-1]
    before = copy.deepcopy(model.state_dict())
    found = []
    with torch.no_grad(), watching(model, [block], lambda call, routed: found.append(routed())):
        model(words())
    (routed,) = found
    down, inputs = inputs_of(model, block, routed)
    experts = model.get_submodule(block.experts)
    for t in range(len(inputs)):
        for slot in range(inputs.shape[1]):
            e = int(routed.index[t, slot])
            bias = (
                experts.down_proj_bias[e]
                if family == "gptoss"
                else experts[e].down.bias
                if family == "plain"
                else 0
            )
            torch.testing.assert_close(
                down.matrix(e) @ inputs[t, slot] + bias, routed.output[t, slot], rtol=1e-4, atol=1e-5
            )
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_it_is_the_ridge_solution(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "DAMPINGS", (1e-2,))
    torch.manual_seed(0)
    model = PlainLM(inner=3, experts=5, k=2).eval()
    ids = words(20, 12)
    graph = trace_experts(model, ids)
    keep = {"blocks.1": np.array([True, False, True, True, False])}
    small = apply_experts(model, plan_of(graph, keep), graph=graph)
    repaired = repair_experts(small, model, [ids], graph=graph)
    entry = sc.record_of(repaired).repairs[0]
    assert entry["kept"]
    assert entry["blocks"]["blocks.1"]["after"] < entry["blocks"]["blocks.1"]["before"]

    seen = []
    model.blocks[1].register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    with torch.no_grad():
        model(ids)
    x, y = (t.detach().double().flatten(0, 1) for t in seen[0])
    block: Mixture = copy.deepcopy(small.blocks[1]).double()
    rows, targets = [], []
    for t in range(len(x)):
        values, chosen = block.router(x[t]).topk(2)
        row = torch.zeros(3, 3, dtype=torch.float64)
        for weight, e in zip(values.softmax(-1), chosen, strict=True):
            row[e] = weight * torch.tanh(block.experts[e].up(x[t]))
        rows.append(row.flatten().detach())
        targets.append((y[t] - block(x[t][None])[0]).detach())
    a, b = torch.stack(rows), torch.stack(targets)
    ridge = 1e-2 * (a.T @ a).diagonal().mean()
    change = torch.linalg.solve(a.T @ a + ridge * torch.eye(9, dtype=torch.float64), a.T @ b).reshape(
        3, 3, -1
    )
    for e in range(3):
        got = repaired.blocks[1].experts[e].down.weight - small.blocks[1].experts[e].down.weight
        torch.testing.assert_close(got.detach().double(), change[e].T, rtol=1e-3, atol=1e-5)
    for name, tensor in small.blocks[0].state_dict().items():
        assert torch.equal(tensor, repaired.blocks[0].state_dict()[name])


@pytest.mark.parametrize("family", ["qwen2", "mixtral", "gptoss", "plain"])
def test_on_new_tokens_the_output_comes_nearer(family: str) -> None:
    model, small, graph = pruned(family)
    before = copy.deepcopy(small.state_dict())
    repaired = repair_experts(small, model, list(words(120, 20, seed=1).chunk(4)), graph=graph)
    ids = words(8, 20, seed=2)
    dense = logits(model, ids)
    assert (logits(repaired, ids) - dense).norm() < 0.95 * (logits(small, ids) - dense).norm()
    assert all(torch.equal(tensor, before[name]) for name, tensor in small.state_dict().items())


def test_blocks_that_do_not_fit_together_are_read_in_turn() -> None:
    model, small, graph = pruned("plain")
    data = list(words(40, 20, seed=1).chunk(2))
    together = repair_experts(small, model, data, graph=graph)
    apart = repair_experts(small, model, data, graph=graph, memory=2 * 8 * (3 * 12) ** 2)
    for name, tensor in together.state_dict().items():
        assert torch.equal(tensor, apart.state_dict()[name])
    with pytest.raises(
        sc.SettingError, match=r"expected sums that fit into 1,000 bytes, got 9,216 for blocks.0"
    ):
        repair_experts(small, model, data, graph=graph, memory=1000)


def test_too_little_data_changes_nothing_rather_than_harm() -> None:
    model, small, graph = pruned("mixtral")
    repaired = repair_experts(small, model, [words(1, 4)], graph=graph)
    for result in sc.record_of(repaired).repairs[0]["blocks"].values():
        assert result["after"] <= result["before"]
