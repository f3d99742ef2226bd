"""The refitted down-projections solve the ridge problem that the docstring states."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import secateur as sc
from secateur.targets.experts import repair as room
from secateur.targets.experts.down import inputs_of
from secateur.targets.experts.repair import passes
from secateur.targets.experts.routing import watching
from tests.targets.experts.models import FAMILIES, Mixture, PlainLM, make, spread, words
from tests.targets.experts.test_apply import logits, masks, plan_of


def pruned(family: str) -> tuple[nn.Module, nn.Module, Any]:
    model = make(family)
    graph = sc.trace(model, words(), granularity="expert")
    return model, sc.apply(model, plan_of(graph, masks(graph, seed=4)), graph=graph), graph


@pytest.mark.parametrize("family", FAMILIES)
def test_what_goes_into_the_down_projections_gives_the_experts_outputs(family: str) -> None:
    model = make(family)
    graph = sc.trace(model, words(), granularity="expert")
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


@pytest.mark.parametrize("together", [3, 2, 1])
def test_it_is_the_ridge_solution(together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all experts at once, or of some after others: then to what those before them leave."""
    monkeypatch.setattr(room, "DAMPINGS", (1e-2,))
    torch.manual_seed(0)
    model = PlainLM(inner=3, experts=5, k=2).eval()
    ids = words(20, 12)
    graph = sc.trace(model, ids, granularity="expert")
    keep = {"blocks.1": np.array([True, False, True, True, False])}
    small = sc.apply(model, plan_of(graph, keep), graph=graph)
    repaired = sc.repair(small, model, [ids], graph=graph, memory=16 * (3 * together) ** 2)
    entry = sc.record_of(repaired).repairs[0]
    assert entry["kept"]
    found = entry["blocks"]["blocks.1"]
    assert found["after"] < found["before"]
    parts = [range(part[0], part[-1] + 1) for part in np.array_split(np.arange(3), -(-3 // together))]
    assert len(found["dampings"]) == len(parts)
    assert set(found["dampings"]) <= {1e-2, None}

    seen = []
    model.blocks[1].register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    with torch.no_grad():
        model(ids)
    x, y = (t.detach().double().flatten(0, 1) for t in seen[0])
    block: Mixture = copy.deepcopy(small.blocks[1]).double()
    for part, damping in zip(parts, found["dampings"], strict=True):
        if damping is None:  # no better on held-out tokens
            continue
        rows, targets = [], []
        for t in range(len(x)):
            values, chosen = block.router(x[t]).topk(2)
            row = torch.zeros(3, 3, dtype=torch.float64)
            for weight, e in zip(values.softmax(-1), chosen, strict=True):
                row[e] = weight * torch.tanh(block.experts[e].up(x[t]))
            rows.append(row[part.start : part.stop].flatten().detach())
            targets.append((y[t] - block(x[t][None])[0]).detach())
        a, b = torch.stack(rows), torch.stack(targets)
        ridge = 1e-2 * (a.T @ a).diagonal().mean() * torch.eye(a.shape[1], dtype=torch.float64)
        change = torch.linalg.solve(a.T @ a + ridge, a.T @ b).reshape(len(part), 3, -1)
        for e, matrix in zip(part, change, strict=True):
            block.experts[e].down.weight.data += matrix.T
    for e in range(3):
        got, wanted = repaired.blocks[1].experts[e].down.weight, block.experts[e].down.weight
        torch.testing.assert_close(got.detach().double(), wanted.detach(), rtol=1e-3, atol=1e-5)
    for name, tensor in small.blocks[0].state_dict().items():
        assert torch.equal(tensor, repaired.blocks[0].state_dict()[name])


def test_passes_take_all_experts_of_a_block_or_one_part_of_each_block_at_a_time() -> None:
    model, _, graph = pruned("plain")
    blocks = list(graph.blocks)
    kept = dict.fromkeys((block.name for block in blocks), 3)

    def ranges(memory: int) -> list[list[tuple[str, list[int]]]]:
        return [
            [(p.block.name, list(p.experts)) for p in part] for part in passes(model, blocks, kept, memory)
        ]

    one = 16 * 12**2
    names = list(kept)
    assert ranges(len(names) * 9 * one) == [[(name, [0, 1, 2]) for name in names]]
    assert ranges(9 * one) == [[(name, [0, 1, 2])] for name in names]
    assert ranges(4 * one) == [[(name, [0, 1])] for name in names] + [[(name, [2]) for name in names]]
    assert len(names) <= 4
    assert ranges(one) == [[(name, [e])] for e in range(3) for name in names]


@pytest.mark.parametrize("family", ["qwen2", "mixtral", "gptoss", "plain"])
def test_on_new_tokens_the_output_comes_nearer(family: str) -> None:
    model, small, graph = pruned(family)
    before = copy.deepcopy(small.state_dict())
    repaired = sc.repair(small, model, list(words(120, 20, seed=1).chunk(4)), graph=graph)
    ids = words(8, 20, seed=2)
    dense = logits(model, ids)
    assert (logits(repaired, ids) - dense).norm() < 0.95 * (logits(small, ids) - dense).norm()
    assert all(torch.equal(tensor, before[name]) for name, tensor in small.state_dict().items())


class Masked(PlainLM):
    """Takes a mask of padding, which its layers do not need: each token is for itself."""

    def forward(self, input_ids: torch.Tensor, attention_mask: Any = None) -> torch.Tensor:
        return super().forward(input_ids)


def test_padding_does_not_count() -> None:
    torch.manual_seed(0)
    model = spread(Masked()).eval()
    plain = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in words(40, 10).chunk(4)]
    longer = [
        {name: torch.nn.functional.pad(t, (0, 6), value=7 * (name == "input_ids")) for name, t in b.items()}
        for b in plain
    ]
    graph = sc.trace(model, plain[0], granularity="expert")
    scores = sc.score(graph, plain, "frequency", progress=False)
    small = sc.apply(model, sc.Uniform(ratio=0.5, removal="frequency").allocate(graph, scores), graph=graph)
    found, wanted = (sc.repair(small, model, d, graph=graph, progress=False) for d in (longer, plain))
    for (name, mine), theirs in zip(found.state_dict().items(), wanted.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, msg=name)
    assert not torch.equal(found.blocks[0].experts[0].down.weight, small.blocks[0].experts[0].down.weight)


def test_blocks_that_do_not_fit_together_are_read_in_turn() -> None:
    model, small, graph = pruned("plain")
    data = list(words(40, 20, seed=1).chunk(2))
    together = sc.repair(small, model, data, graph=graph)
    apart = sc.repair(small, model, data, graph=graph, memory=2 * 8 * (3 * 12) ** 2)
    for name, tensor in together.state_dict().items():
        assert torch.equal(tensor, apart.state_dict()[name])
    with pytest.raises(
        sc.SettingError, match=r"expected sums that fit into 1,000 bytes, got 2,304 for an expert of blocks.0"
    ):
        sc.repair(small, model, data, graph=graph, memory=1000)


def test_too_little_data_changes_nothing_rather_than_harm() -> None:
    model, small, graph = pruned("mixtral")
    repaired = sc.repair(small, model, [words(1, 4)], graph=graph)
    for result in sc.record_of(repaired).repairs[0]["blocks"].values():
        assert result["after"] <= result["before"]
