"""Removed experts merged into those that stay, against what the formulas say."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.calibration import Calibration
from secateur.measure.kernels import with_loop
from secateur.targets.experts.down import inputs_of
from secateur.targets.experts.graph import ExpertGraph
from secateur.targets.experts.merge import Heirs, heirs, merge
from secateur.targets.experts.neurons import Neurons, neurons_of, output_of, tensors_of
from secateur.targets.experts.routing import Routed, watching
from tests.targets.experts.models import FAMILIES, WORDS, Mixture, PlainLM, make, spread, words
from tests.targets.experts.test_apply import masks, plan_of


def layout(model: nn.Module, graph: ExpertGraph, expert: int = 0) -> Neurons:
    block = graph.blocks[-1]
    seen: list[Routed] = []
    with torch.no_grad(), watching(model, [block], lambda _, routed: seen.append(routed())):
        model(words())
    return neurons_of(model, block, inputs_of(model, block, seen[0])[0], expert)


def shuffle(model: nn.Module, graph: ExpertGraph, expert: int, order: Tensor) -> None:
    """Put the neurons of an expert into another order; what it computes stays."""
    found = layout(model, graph, expert)
    for name, tensor in tensors_of(model, graph.blocks[-1], expert).items():
        if found.axes[name] is not None:
            found.write(name, tensor.data, found.rows(name, tensor.data)[order])


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_neurons_in_another_order_compute_the_same(family: str) -> None:
    model = with_loop(make(family).double())
    graph = sc.trace(model, words(), granularity="expert")
    block, tokens = graph.blocks[-1], torch.randn(20, 32, dtype=torch.float64)
    before = output_of(model, block, 1, tokens)
    found = layout(model, graph, 1)
    order = torch.randperm(found.inner, generator=torch.Generator().manual_seed(0))
    shuffle(model, graph, 1, order)
    torch.testing.assert_close(output_of(model, block, 1, tokens), before, rtol=1e-12, atol=1e-12)

    name = next(n for n, axis in found.axes.items() if axis is not None)  # of one tensor alone: not the same
    tensor = tensors_of(model, block, 1)[name].data
    found.write(name, tensor, found.rows(name, tensor).roll(1, 0))
    assert float((output_of(model, block, 1, tokens) - before).abs().max()) > 1e-2


@pytest.mark.parametrize("family", ["qwen2", "gptoss", "plain"])
@torch.no_grad()
def test_a_copy_with_its_neurons_shuffled_is_merged_into_its_original_without_a_trace(family: str) -> None:
    model = with_loop(make(family).double())
    graph = sc.trace(model, words(), granularity="expert")
    block = graph.blocks[-1]
    for name, tensor in tensors_of(model, block, 3).items():
        tensor.data.copy_(tensors_of(model, block, 1)[name])
    inner = layout(model, graph).inner
    shuffle(model, graph, 3, torch.randperm(inner, generator=torch.Generator().manual_seed(0)))
    keep = {block.name: np.arange(block.count) != 3}
    small = sc.apply(model, plan_of(graph, keep), graph=graph)
    kept = {block.name: [e for e in range(block.count) if e != 3]}
    (found,) = heirs(model, [block], kept, Calibration.of([words(30, 20)]))
    assert found.heir == {3: 1}
    before = copy.deepcopy(small.state_dict())
    merge(small, model, found, 1.0)
    for name, tensor in small.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_the_heir_changes_least_and_the_average_is_weighted_by_the_router() -> None:
    torch.manual_seed(0)
    model = PlainLM(inner=3, experts=5, k=2).eval().double()
    ids = words(20, 12)
    graph = sc.trace(model, ids, granularity="expert")
    block, kept = graph.blocks[1], [0, 2, 3]
    keep = {block.name: np.array([True, False, True, True, False])}
    small = sc.apply(model, plan_of(graph, keep), graph=graph)
    (found,) = heirs(model, [block], {block.name: kept}, Calibration.of([ids]))

    seen: list[Tensor] = []
    handle = model.blocks[1].register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    model(ids)
    handle.remove()
    values, chosen = model.blocks[1].router(seen[0]).topk(2)
    weights = torch.zeros(len(chosen), 5, dtype=torch.float64).scatter(1, chosen, values.softmax(-1))
    outputs = [expert(seen[0]) for expert in model.blocks[1].experts]
    for removed in (1, 4):  # 240 tokens: all are compared
        change = [
            (weights[::1, removed, None] * (outputs[removed] - outputs[h])).square().sum() for h in kept
        ]
        assert found.heir[removed] == kept[int(torch.stack(change).argmin())]
    torch.testing.assert_close(found.weight, weights.sum(0), rtol=1e-6, atol=1e-6)

    block_of = Heirs(block, kept, weights.sum(0), {1: 2, 4: 2}, found.down)
    merge(small, model, block_of, 0.5)
    experts = model.blocks[1].experts
    for name in ("up.weight", "up.bias", "down.weight", "down.bias"):
        for position, heir in ((0, 0), (2, 3)):
            torch.testing.assert_close(
                small.blocks[1].experts[position].get_parameter(name), experts[heir].get_parameter(name)
            )
    best: dict[int, tuple[int, ...]] = {}
    orders = [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]

    def parts(expert: nn.Module) -> list[Tensor]:  # by neuron
        return [expert.up.weight, expert.up.bias[:, None], expert.down.weight.T]

    for removed in (1, 4):

        def alike(order: tuple[int, ...], removed: int = removed) -> float:
            pairs = zip(parts(experts[2]), parts(experts[removed]), strict=True)
            return sum(float((a * b[list(order)]).sum() / (a.norm() * b.norm())) for a, b in pairs)

        best[removed] = max(orders, key=alike)
    share = {2: float(weights[:, 2].sum()), **{r: 0.5 * float(weights[:, r].sum()) for r in (1, 4)}}
    total = sum(share.values())
    for k, got in enumerate(parts(small.blocks[1].experts[1])):
        wanted = share[2] * parts(experts[2])[k]
        wanted = wanted + sum(share[r] * parts(experts[r])[k][list(best[r])] for r in (1, 4))
        torch.testing.assert_close(got, wanted / total, rtol=1e-12, atol=1e-12)
    wanted = share[2] * experts[2].down.bias + sum(share[r] * experts[r].down.bias for r in (1, 4))
    torch.testing.assert_close(small.blocks[1].experts[1].down.bias, wanted / total, rtol=1e-12, atol=1e-12)


def pruned(family: str) -> tuple[nn.Module, nn.Module, Any, list[Tensor]]:
    model = make(family)
    graph = sc.trace(model, words(), granularity="expert")
    small = sc.apply(model, plan_of(graph, masks(graph, seed=4)), graph=graph)
    return model, small, graph, list(words(120, 20, seed=1).chunk(4))


@pytest.mark.parametrize("family", ["qwen2", "gptoss", "deepseek", "plain"])
def test_on_held_out_tokens_no_block_is_further_off_than_with_its_experts_dropped(family: str) -> None:
    model, small, graph, data = pruned(family)
    before = copy.deepcopy(small.state_dict())
    (dropped,) = sc.record_of(sc.repair(small, model, data, "experts", graph=graph)).repairs
    (merged,) = sc.record_of(sc.repair(small, model, data, "merge", graph=graph)).repairs
    first, second = sc.record_of(sc.repair(small, model, data, ["merge", "experts"], graph=graph)).repairs
    assert (merged["method"], first["method"], second["method"]) == ("merge", "merge", "experts")
    for name, block in dropped["blocks"].items():
        assert merged["blocks"][name]["before"] == block["before"]
        assert merged["blocks"][name]["after"] <= block["before"]
        assert first["blocks"][name]["before"] == block["after"]
        assert first["blocks"][name]["after"] == second["blocks"][name]["after"] <= block["after"]
    assert any(block["share"] > 0 for block in merged["blocks"].values())
    assert all(torch.equal(tensor, before[name]) for name, tensor in small.state_dict().items())


def test_what_a_merge_says_it_reaches_is_what_the_model_reaches() -> None:
    """One batch, so that its last fifth is what is held out."""
    model, small, graph, _ = pruned("plain")
    ids = words(50, 20, seed=3)
    merged = sc.repair(small, model, [ids], "merge", graph=graph)
    (entry,) = sc.record_of(merged).repairs
    assert entry["kept"]
    for number in (0, 1):
        seen: list[tuple[Tensor, Tensor]] = []
        handle = model.blocks[number].register_forward_hook(
            lambda _, args, out, seen=seen: seen.append((args[0], out))
        )
        with torch.no_grad():
            model(ids)
            handle.remove()
            off = (merged.blocks[number](seen[0][0]) - seen[0][1]).double().flatten(0, 1).square().sum(1)
        held = float(off[len(off) - len(off) // 5 :].sum())
        assert entry["blocks"][f"blocks.{number}"]["after"] == pytest.approx(held, rel=1e-5)


def test_an_expert_that_no_token_uses_has_no_heir() -> None:
    model = make("plain")
    with torch.no_grad():
        model.blocks[1].router.bias[3] = -1e4
    graph = sc.trace(model, words(), granularity="expert")
    block = graph.blocks[1]
    (found,) = heirs(model, [block], {block.name: [0, 1, 2, 4, 5]}, Calibration.of([words(30, 20)]))
    assert found.heir == {}


class _Doubtful(Mixture):
    """A token uses an expert only if the router is sure of it: up to two."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        weights, chosen = self.router(flat).sigmoid().topk(2, dim=-1)
        weights = weights * (weights > 0.9)
        out = self.shared(flat)
        for number, expert in enumerate(self.experts):
            tokens, slots = torch.where(chosen == number)
            out = out.index_add(0, tokens, weights[tokens, slots, None] * expert(flat[tokens]))
        return out.reshape(x.shape)


@torch.no_grad()
def test_tokens_of_another_batch_may_use_fewer_experts() -> None:
    torch.manual_seed(0)
    model: Any = spread(PlainLM()).double().eval()
    for block in model.blocks:
        block.__class__ = _Doubtful
    batches = [words(6, 20), *(torch.full((1, 1), word) for word in range(WORDS))]
    graph = sc.trace(model, batches[0], granularity="expert")
    block, mixture = graph.blocks[1], model.blocks[1]
    kept = [0, 2, 3, 5]
    seen: list[Tensor] = []
    handle = mixture.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    for batch in batches:
        model(batch)
    handle.remove()
    values, chosen = mixture.router(torch.cat(seen)).sigmoid().topk(2)
    assert {int((v > 0.9).sum(1).max()) for v in values.split([len(x) for x in seen])} == {0, 1, 2}
    weights = torch.zeros(len(chosen), 6, dtype=torch.float64).scatter(1, chosen, values * (values > 0.9))
    outputs = [expert(torch.cat(seen)) for expert in mixture.experts]

    (found,) = heirs(model, [block], {block.name: kept}, Calibration.of(batches))
    torch.testing.assert_close(found.weight, weights.sum(0), rtol=1e-5, atol=1e-5)
    assert set(found.heir) == {1, 4}
    for removed in (1, 4):
        off = [(weights[:, removed, None] * (outputs[removed] - outputs[h])).square().sum() for h in kept]
        assert found.heir[removed] == kept[int(torch.stack(off).argmin())]


class _Deeper(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up, self.mid, self.down = (
            nn.Linear(width, inner),
            nn.Linear(inner, inner),
            nn.Linear(inner, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        down: Tensor = self.down(torch.tanh(self.mid(torch.tanh(self.up(x)))))
        return down


def test_experts_of_several_layers_are_refused() -> None:
    torch.manual_seed(0)
    model = PlainLM().eval()
    for block in model.blocks:
        block.experts = nn.ModuleList(_Deeper(32, 12) for _ in range(6))
    graph = sc.trace(model, words(), granularity="expert")
    small = sc.apply(model, plan_of(graph, masks(graph, seed=4)), graph=graph)
    with pytest.raises(sc.SettingError, match=r"expected experts with one layer of 12 neurons"):
        sc.repair(small, model, [words(30, 20)], "merge", graph=graph)


def test_other_methods_and_another_order_are_refused() -> None:
    model, small, graph, data = pruned("plain")
    for wrong in (["experts", "merge"], 3):
        with pytest.raises(sc.SettingError, match=r"expected None, 'auto', 'experts', 'merge' or \["):
            sc.repair(small, model, data, wrong, graph=graph)  # type: ignore[arg-type]


@pytest.mark.parametrize("methods", ["merge", ["merge", "experts"]])
def test_prune_merges_where_the_held_out_loss_agrees(methods: Any) -> None:
    model = make("qwen2")
    data = [{"input_ids": part, "labels": part} for part in words(40, 16).chunk(5)]
    result = sc.prune(
        model, data, sc.Budget(experts=0.5), "uniform", "expert", repair=methods, measure_latency=False,
        progress=False,
    )  # fmt: skip
    entries = sc.record_of(result.model).repairs
    names = [entry["method"] for entry in entries]
    assert "merge" in names
    assert ("experts" in names) is (methods != "merge")
    figures = {f.stage: f.loss for f in result.report.figures}
    assert figures.get("repaired", 0.0) <= figures["pruned"]


@torch.no_grad()
def test_an_expert_is_merged_into_none_with_another_number_of_neurons() -> None:
    model = make("plain")
    graph = sc.trace(model, words(), granularity="expert")
    block = graph.blocks[1]
    for expert, inner in ((0, 9), (1, 9), (2, 10)):  # as after neurons of single experts were removed
        layers = model.blocks[1].experts[expert]
        layers.up.weight.data, layers.up.bias.data = layers.up.weight[:inner], layers.up.bias[:inner]
        layers.down.weight.data = layers.down.weight[:, :inner]
    (found,) = heirs(model, [block], {block.name: [0, 3, 4]}, Calibration.of([words(30, 20)]))
    assert found.heir[1] == 0
    assert 2 not in found.heir
    assert found.heir[5] in (3, 4)
