"""Signals against slow, literal versions of their formulas; and what holds for all of them."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import wasserstein_distance
from torch import Tensor, nn

import secateur as sc
from secateur.signals.experts import SIGNALS
from secateur.signals.units.wasserstein import directions
from tests.targets.experts.models import EXPERTS, FAMILIES, Mixture, PlainLM, make, words

IDS = words(4, 10)
NAME = "model.layers.1.mlp"


def plain_loss(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


def batches(family: str, count: int = 2) -> list[Any]:
    parts = IDS.chunk(count)
    return [(p, p) for p in parts] if family == "plain" else [{"input_ids": p, "labels": p} for p in parts]


def scored(family: str, signals: Any, count: int = 2, model: nn.Module | None = None) -> sc.Scores:
    model = model or make(family)
    loss = plain_loss if family == "plain" else None
    return sc.score(sc.trace(model, IDS, granularity="expert"), batches(family, count), signals, loss_fn=loss)


def hidden_of(model: nn.Module, name: str) -> Tensor:
    """What reaches a block, for all tokens. [tokens, width]"""
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda _, args: seen.append(args[0].detach())
    )
    with torch.no_grad():
        model(IDS)
    handle.remove()
    return seen[0].reshape(-1, seen[0].shape[-1])


class Literal:
    """Qwen2's block, one token and one expert at a time, in float64.

    Args:
        model: Its model.
        normalises: Whether a token's weights are scaled to a sum of 1 after top-k.
    """

    def __init__(self, model: nn.Module, normalises: bool = False) -> None:
        self.normalises = normalises
        block = copy.deepcopy(model.get_submodule(NAME)).double()
        self.x = hidden_of(model, NAME).double()
        self.router, self.up, self.down = (
            block.gate.weight,
            block.experts.gate_up_proj,
            block.experts.down_proj,
        )
        self.k = block.gate.top_k

    def routing(self, t: int, without: int | None = None) -> dict[int, float]:
        score = self.x[t] @ self.router.T
        if without is not None:
            score = score.masked_fill(torch.arange(EXPERTS) == without, -torch.inf)
        probability = score.softmax(-1)
        chosen = probability.argsort(descending=True)[: self.k]
        total = float(probability[chosen].sum()) if self.normalises else 1.0
        return {int(e): float(probability[e]) / total for e in chosen}

    def expert(self, e: int, t: int) -> Tensor:
        gate, up = (self.x[t] @ self.up[e].T).chunk(2)
        return (F.silu(gate) * up) @ self.down[e].T

    def routed(self, t: int, without: int | None = None) -> Tensor:
        return sum(w * self.expert(e, t) for e, w in self.routing(t, without).items())  # type: ignore[return-value]


@pytest.mark.parametrize("normalises", [False, True])
@torch.no_grad()
def test_routing_signals_are_their_formulas(normalises: bool) -> None:
    """Each reads the weights that the block applies: scaled to a sum of 1 where the router does that."""
    model = make("qwen2")
    for layer in model.model.layers:
        layer.mlp.gate.norm_topk_prob = normalises
    block, tokens = Literal(model, normalises), IDS.numel()
    sums = [sum(block.routing(t).values()) for t in range(tokens)]
    assert (max(abs(s - 1) for s in sums) < 1e-9) is normalises
    expected = {s: np.zeros(EXPERTS) for s in ("frequency", "router_weight", "reap", "output_change")}
    count = np.zeros(EXPERTS)
    for t in range(tokens):
        for e, weight in block.routing(t).items():
            count[e] += 1
            expected["frequency"][e] += 1 / tokens
            expected["router_weight"][e] += weight / tokens
            expected["reap"][e] += weight * float(block.expert(e, t).norm())
            change = (block.routed(t) - block.routed(t, without=e)).norm()
            expected["output_change"][e] += float(change) / tokens
    expected["reap"] /= np.maximum(count, 1)
    found = scored("qwen2", tuple(expected), model=model)
    for signal, values in expected.items():
        np.testing.assert_allclose(found[signal][NAME], values, rtol=1e-4, atol=1e-7)


@torch.no_grad()
def test_specialisation_is_a_sliced_wasserstein_distance() -> None:
    model = make("qwen2")
    block = Literal(model)
    outputs = torch.stack([block.routed(t) for t in range(IDS.numel())])
    slices = (outputs @ directions(32, 16, seed=0)).numpy()
    found = scored("qwen2", "specialisation", model=model)["specialisation"][NAME]
    for e in range(EXPERTS):
        own = np.array([e in block.routing(t) for t in range(len(slices))])
        parts = (
            [wasserstein_distance(slices[own, p], slices[~own, p]) for p in range(16)] if own.any() else [0.0]
        )
        assert found[e] == pytest.approx(np.mean(parts), rel=1e-4)


def test_taylor_is_weight_times_gradient() -> None:
    model = make("qwen2")
    expected = np.zeros(EXPERTS)
    for batch in batches("qwen2"):
        model.zero_grad()
        model(**batch).loss.backward()
        experts = model.get_submodule(NAME).experts
        for p in (experts.gate_up_proj, experts.down_proj):
            expected += (p.detach().double() * p.grad.double()).sum((1, 2)).numpy()
    model.zero_grad()
    np.testing.assert_allclose(
        scored("qwen2", "expert_taylor", model=model)["expert_taylor"][NAME], abs(expected), rtol=1e-4
    )


def test_weight_norm() -> None:
    model = make("gptoss")
    experts = model.get_submodule(NAME).experts
    expected = [
        float(torch.cat([p[e].detach().double().flatten() for p in experts.parameters()]).norm())
        for e in range(EXPERTS)
    ]
    graph = sc.trace(model, IDS, granularity="expert")
    np.testing.assert_allclose(sc.score(graph, None, "weight_norm")["weight_norm"][NAME], expected, rtol=1e-9)


@torch.no_grad()
def test_a_list_of_experts_is_watched_like_fused_ones() -> None:
    model = make("plain")
    block = copy.deepcopy(model.blocks[1]).double()
    x = hidden_of(model, "blocks.1").double()
    top = block.router(x).topk(2, dim=-1)
    weights = top.values.softmax(-1)
    reap = np.zeros(6)
    for e in range(6):
        tokens, slots = torch.where(top.indices == e)
        if len(tokens):
            reap[e] = float((weights[tokens, slots] * block.experts[e](x[tokens]).norm(dim=-1)).mean())
    found = scored("plain", ("reap", "frequency"), model=model)
    np.testing.assert_allclose(found["reap"]["blocks.1"], reap, rtol=1e-4)
    assert found["frequency"]["blocks.1"].sum() == pytest.approx(2)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_signal_on_every_family_leaves_the_model_alone(family: str) -> None:
    model = make(family).train()
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    next(model.parameters()).requires_grad_(False)
    before = copy.deepcopy({n: (t, t.requires_grad) for n, t in model.state_dict(keep_vars=True).items()})
    state = torch.get_rng_state()
    found = scored(family, tuple(SIGNALS), model=model)
    assert torch.equal(state, torch.get_rng_state())
    after = model.state_dict(keep_vars=True)
    assert all(torch.equal(after[n], t) and after[n].requires_grad == r for n, (t, r) in before.items())
    assert torch.equal(next(model.parameters()).grad, torch.ones_like(next(model.parameters())))  # type: ignore[arg-type]
    assert all(p.grad is None for p in list(model.parameters())[1:])
    assert all(m.training for m in model.modules())
    assert not any("forward" in vars(m) or m._forward_hooks for m in model.modules())
    for signal in SIGNALS:
        for vector in found[signal].values():
            assert vector.min() >= 0
            assert vector.max() > vector.min()


@pytest.mark.parametrize("signal", [s for s in SIGNALS if s != "expert_taylor"])
def test_batches_may_be_cut_anywhere(signal: str) -> None:
    one, four = (scored("mixtral", signal, count)[signal] for count in (1, 4))
    for name, vector in one.items():
        np.testing.assert_allclose(four[name], vector, rtol=1e-5)


def test_padding_counts_for_nothing() -> None:
    model = make("mixtral")
    graph = sc.trace(model, IDS, granularity="expert")
    mask = torch.ones_like(IDS)
    mask[:, 7:] = 0
    signals = ("frequency", "reap", "output_change")
    padded = sc.score(graph, [{"input_ids": IDS, "attention_mask": mask}], signals)
    short = sc.score(graph, [{"input_ids": IDS[:, :7]}], signals)
    for signal in signals:
        np.testing.assert_allclose(padded[signal][NAME], short[signal][NAME], rtol=1e-4)


def test_an_expert_never_routed_to_is_worth_nothing() -> None:
    model = make("plain")
    with torch.no_grad():
        model.blocks[0].router.bias[3] = -1e4
    found = scored(
        "plain", ("frequency", "reap", "output_change", "specialisation", "expert_taylor"), model=model
    )
    assert all(found[s]["blocks.0"][3] == 0 for s in found.signals)


def test_more_experts_than_the_block_is_wide() -> None:
    model = PlainLM(experts=40, k=3).eval()
    found = scored("plain", "frequency", model=model)["frequency"]["blocks.0"]
    top = model.blocks[0].router(hidden_of(model, "blocks.0")).topk(3, dim=-1).indices
    np.testing.assert_allclose(found, np.bincount(top.flatten(), minlength=40) / len(top))


def test_half_precision() -> None:
    found = scored("mixtral", ("reap", "frequency", "expert_taylor"), model=make("mixtral").bfloat16())
    whole = scored("mixtral", ("reap", "frequency"))
    assert np.corrcoef(found["reap"][NAME], whole["reap"][NAME])[0, 1] > 0.9
    assert found["frequency"][NAME].sum() == pytest.approx(2)


def test_combinations_by_name() -> None:
    found = scored("mixtral", ("frequency*reap", "frequency+expert_taylor"))
    assert {"frequency*reap", "frequency+expert_taylor"} <= set(found.signals)


def test_unknown_signals_and_missing_data_are_refused() -> None:
    graph = sc.trace(make("plain"), IDS, granularity="expert")
    with pytest.raises(sc.ScoreError, match="expected one of frequency, router_weight, reap"):
        sc.score(graph, None, "wasserstein")
    with pytest.raises(sc.CalibrationError, match="expected calibration data for reap, got none"):
        sc.score(graph, None, "reap")


def test_experts_with_another_call_are_left_by_name() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Parameter(torch.randn(4, 32, 8)), nn.Parameter(torch.randn(4, 8, 32))

        def forward(self, x: Tensor, weights: Tensor) -> Tensor:
            return torch.einsum("te,ted->td", weights, torch.einsum("ti,eij,ejd->ted", x, self.up, self.down))

    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.experts = nn.Linear(32, 4), Odd()

        def forward(self, x: Tensor) -> Tensor:
            flat = x.flatten(0, 1)
            return self.experts(flat, self.gate(flat).softmax(-1)).view_as(x)

    model = PlainLM().eval()
    model.blocks[0] = Dense()
    graph = sc.trace(model, IDS, granularity="expert")
    assert [b.name for b in graph.blocks] == ["blocks.1"]
    assert "expected a call with tokens [T, width], chosen experts [T, k]" in graph.left[0].reason
    assert isinstance(model.blocks[1], Mixture)
