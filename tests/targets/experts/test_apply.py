"""Experts removed for real equal a dense model that may not choose them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

import secateur as sc
from secateur.plan import Plan
from secateur.targets.experts.apply import verify
from secateur.targets.experts.graph import ExpertGraph
from tests.targets.experts.models import FAMILIES, PlainLM, make, maker, words


def masks(graph: ExpertGraph, seed: int, *, equal: bool = False) -> dict[str, NDArray[np.bool_]]:
    """Random experts to keep: as few as may be in the first block, unless `equal`."""
    rng = np.random.default_rng(seed)
    found = {}
    for number, block in enumerate(graph.blocks):
        size = block.count // block.routing_groups
        least = block.min_keep // block.routing_groups
        kept = least + 1 if equal else least + number % 2
        mask = np.zeros(block.count, dtype=np.bool_)
        for start in range(0, block.count, size):
            mask[start + rng.permutation(size)[:kept]] = True
        found[block.name] = mask
    return found


def plan_of(graph: ExpertGraph, keep: Mapping[str, NDArray[np.bool_]]) -> Plan:
    return Plan.build(graph, keep, allocator="test")  # type: ignore[arg-type]


def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        out = model(ids)
    return getattr(out, "logits", out)


@functools.cache
def traced(family: str) -> tuple[nn.Module, ExpertGraph]:
    model = make(family)
    return model, sc.trace(model, words(3, 16), granularity="expert")


@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_sliced_equals_excluded(family: str, equal: bool) -> None:
    (model, graph), ids = traced(family), words(3, 16)
    plan = plan_of(graph, masks(graph, seed=1, equal=equal))
    small = sc.apply(model, plan, graph=graph)
    assert sc.verify(model, small, plan, ids).difference < 1e-12
    assert sum(p.numel() for p in small.parameters()) == plan.predicted.params
    assert not torch.equal(logits(small, ids), logits(model, ids))
    again = sc.apply(model, Plan.from_json(plan.to_json()))
    assert torch.equal(logits(again, ids), logits(small, ids))


def test_equality_has_an_independent_reference() -> None:
    """Mixtral's block in plain loops over experts, with -inf logits, against the sliced one."""
    model, ids = make("mixtral"), words()
    graph = sc.trace(model, ids, granularity="expert")
    keep = masks(graph, seed=3)
    small = sc.apply(model, plan_of(graph, keep), graph=graph)
    block, cut = model.model.layers[1].mlp, small.model.layers[1].mlp
    x = torch.randn(7, 32, dtype=torch.float64)
    router, up_all, down_all = (
        t.double() for t in (block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj)
    )
    score = x @ router.T
    score[:, torch.as_tensor(~keep["model.layers.1.mlp"])] = -torch.inf
    expected = torch.zeros_like(x)
    for t in range(len(x)):
        probability = score[t].softmax(-1)
        chosen = probability.argsort(descending=True)[:2]
        for e in chosen:
            gate, up = (x[t] @ up_all[e].T).chunk(2)
            out = (torch.nn.functional.silu(gate) * up) @ down_all[e].T
            expected[t] += probability[e] / probability[chosen].sum() * out
    cut.experts.config._experts_implementation = "eager"
    got = cut.double()(x[None])[0]
    # The router casts its probabilities to float32.
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mixtral", "olmoe", "deepseek", "gptoss"])
def test_counts_are_true_where_one_number_can_be(family: str) -> None:
    model = make(family)
    graph = sc.trace(model, words(), granularity="expert")
    small = sc.apply(model, plan_of(graph, masks(graph, seed=0, equal=True)), graph=graph)
    kept = {small.get_parameter(f"{b.router}.weight").shape[0] for b in graph.blocks}
    (new,) = kept
    said = {
        v
        for k, v in small.config.to_dict().items()
        if k in ("num_experts", "num_local_experts", "n_routed_experts")
    }
    assert said == {new}
    for module in small.modules():
        assert getattr(module, "num_experts", new) == new
    assert {b.count for b in graph.blocks} == {
        m.num_experts for m in model.modules() if hasattr(m, "num_experts")
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded_bit_for_bit(family: str, tmp_path: Path) -> None:
    model, ids = make(family), words()
    graph = sc.trace(model, ids, granularity="expert")
    small = sc.apply(model, plan_of(graph, masks(graph, seed=2)), graph=graph)
    sc.save(small, tmp_path)
    assert torch.equal(logits(sc.load(tmp_path, maker(family)), ids), logits(small, ids))


def test_renormalising_is_recorded_and_survives_saving(tmp_path: Path) -> None:
    model, ids = make("qwen2"), words()
    graph = sc.trace(model, ids, granularity="expert")
    plan = plan_of(graph, masks(graph, seed=2))
    plain = sc.apply(model, plan, graph=graph)
    small = sc.apply(model, plan, graph=graph, renormalise=True)
    assert not torch.equal(logits(small, ids), logits(plain, ids))
    assert sc.verify(model, small, plan, ids).difference < 1e-12
    assert sc.record_of(small).note == "renormalise=True"
    assert small.config.norm_topk_prob is True
    assert model.config.norm_topk_prob is False
    sc.save(small, tmp_path)
    assert torch.equal(logits(sc.load(tmp_path, maker("qwen2")), ids), logits(small, ids))


def test_renormalising_is_refused_where_code_decides() -> None:
    model = make("mixtral")
    graph = sc.trace(model, words(), granularity="expert")
    with pytest.raises(sc.SettingError, match="expected routers with the setting norm_topk_prob"):
        sc.apply(model, plan_of(graph, masks(graph, seed=0)), graph=graph, renormalise=True)


def test_too_few_experts_are_refused() -> None:
    model = make("qwen3")
    graph = sc.trace(model, words(), granularity="expert")
    keep = np.zeros(8, dtype=np.bool_)
    keep[:2] = True
    with pytest.raises(sc.PlanError, match="at least 3 experts kept, because a token uses 3, got 2"):
        sc.apply(model, plan_of(graph, {graph.blocks[0].name: keep}), graph=graph)


def test_unequal_routing_groups_are_refused() -> None:
    model = make("deepseek")
    graph = sc.trace(model, words(), granularity="expert")
    keep = np.ones(8, dtype=np.bool_)
    keep[0] = False
    with pytest.raises(
        sc.PlanError, match=r"equally many experts kept in each of its 2 routing groups, got \[3, 4\]"
    ):
        sc.apply(model, plan_of(graph, {graph.blocks[0].name: keep}), graph=graph)


def test_verification_fails_where_it_must() -> None:
    model, ids = make("qwen2"), words()
    graph = sc.trace(model, ids, granularity="expert")
    plan = plan_of(graph, masks(graph, seed=1))
    small = sc.apply(model, plan, graph=graph)
    with torch.no_grad():
        small.get_parameter("model.layers.0.mlp.experts.down_proj").mul_(1.001)
    with pytest.raises(sc.VerificationError, match="verify: expected the pruned"):
        sc.verify(model, small, plan, ids)


def test_experts_that_no_token_reaches_are_compared_too() -> None:
    torch.manual_seed(0)
    model = PlainLM(experts=20, k=1).eval()
    ids = torch.zeros(1, 2, dtype=torch.long)
    graph = sc.trace(model, ids, granularity="expert")
    plan = plan_of(graph, masks(graph, seed=1))
    small = sc.apply(model, plan, graph=graph)
    assert sc.verify(model, small, plan, ids).proven
    for name, tensor in small.state_dict().items():
        before = tensor.clone()
        tensor.view(-1)[0] += 1
        with pytest.raises(sc.VerificationError):
            verify(model, small, plan, ids, graph=graph)  # tracing anew each time would take a minute
        tensor.copy_(before)
        assert verify(model, small, plan, ids, graph=graph).proven, name
