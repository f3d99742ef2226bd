"""A layer of low rank computes what one layer with the product of the two as its weight computes."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.targets.lowrank.apply import verify
from secateur.targets.lowrank.factorise import factorise
from secateur.targets.lowrank.pair import LowRank, matrix_of, most_directions, pairs_of
from secateur.targets.units.compare import relative_difference, run
from tests.targets.blocks.models import LIBRARIES, make
from tests.targets.lowrank.models import LAYERS, MAPS, batches, rank_plan, several

BOTH = ("rank", ["unit", "rank"])
NAMES = ("llama", "qwen3", "gemma3", "gpt2", "bert", "vit", "qwen2_moe", "t5", "deit", "convnext", "resnet")
SLOW = {"gemma3", "qwen2_moe", "t5", "convnext", "deit"}
LONG = {"llama", "gpt2", "bert"}
"""Slow with units as well; Qwen3 and ViT stay."""


def traced(pairs: nn.Module, inputs: Any, granularity: Any = "rank", **options: Any) -> Any:
    return sc.trace(pairs, inputs, granularity=granularity, **options)


@pytest.mark.parametrize("granularity", BOTH)
def test_pruned_equals_the_products(granularity: Any) -> None:
    model = several()
    pairs = factorise(model, batches(), progress=False)
    graph = traced(pairs, MAPS.double(), granularity)
    for seed in range(3):
        plan = rank_plan(graph, ratio=0.2 + 0.2 * seed, seed=seed)
        assert plan.granularity == ("rank" if granularity == "rank" else "unit+rank")
        for form in ("module", "graph", "masked"):
            small = sc.apply(pairs, plan, form)  # type: ignore[arg-type]
            proof: Any = sc.verify(pairs, small, plan)
            assert proof.difference <= 1e-9
            assert proof.proven
            assert proof.reference == "products"
        small = sc.apply(pairs, plan)
        assert sum(p.numel() for p in small.parameters()) == plan.predicted.params


def test_literally() -> None:
    """The dense model with each product as its weight, without anything of this library."""
    model = several()
    pairs = factorise(model, batches(), progress=False)
    graph = traced(pairs, MAPS.double())
    plan = rank_plan(graph, seed=1)
    small = sc.apply(pairs, plan)
    reference: Any = copy.deepcopy(model)
    found = pairs_of(small)
    assert 0 < len(found) < len(LAYERS)
    for path, pair in found.items():
        layer: Any = reference.get_submodule(path)
        first, second = pair[0], pair[1]
        product = second.weight.flatten(1) @ first.weight.flatten(1)
        with torch.no_grad():
            layer.weight.copy_(product.reshape(layer.weight.shape))
            if layer.bias is not None:
                layer.bias.copy_(second.weight.flatten(1) @ first.bias + second.bias)
        kept = next(group.kept for group in plan.groups if group.name == f"{path}.first")
        assert pair.rank == kept <= most_directions(layer)
    for x in batches(2):
        assert relative_difference([small(x)], [reference(x)]) <= 1e-12
        assert relative_difference([small(x)], [model(x)]) > 1e-3
    same = [name for name, _ in model.named_parameters() if name.split(".")[0] not in found]
    assert all(torch.equal(small.get_parameter(n), model.get_parameter(n)) for n in same)


def test_another_model_fails_the_comparison() -> None:
    pairs = factorise(several(), batches(), progress=False)
    plan = rank_plan(traced(pairs, MAPS.double()), seed=1)
    small = sc.apply(pairs, plan)
    path = next(iter(pairs_of(small)))
    with torch.no_grad():
        pairs_of(small)[path][1].weight[0] *= 1.001
    with pytest.raises(sc.VerificationError, match="verify: expected the pruned"):
        verify(pairs, small, plan)


@pytest.mark.parametrize(
    ("name", "granularity"),
    [
        pytest.param(n, g, marks=pytest.mark.slow if n in SLOW or (n in LONG and g != "rank") else ())
        for n in NAMES
        for g in BOTH
    ],
)
def test_architectures(name: str, granularity: Any) -> None:
    if name not in LIBRARIES and name != "resnet":
        pytest.skip("its library is not installed")
    model, inputs = make(name)
    if name == "resnet":  # blocks of this one have no convolution with a kernel of 1
        model = bottlenecks()
    pairs = factorise(model, [inputs], progress=False)
    assert pairs_of(pairs)
    args = (inputs,) if isinstance(inputs, Tensor) else ()
    kwargs = {} if isinstance(inputs, Tensor) else inputs
    assert relative_difference(run(pairs, args, kwargs), run(model, args, kwargs)) < 1e-4
    graph = traced(pairs, inputs, granularity, allow_inexact=False)
    whole = sum(p.numel() for p in model.parameters())
    assert graph.cost().params == whole
    for seed in range(2):
        plan = rank_plan(graph, ratio=0.25 + 0.25 * seed, seed=seed)
        small = sc.apply(pairs, plan, graph=graph)
        proof: Any = sc.verify(pairs, small, plan)
        assert proof.difference <= 1e-9
        assert proof.reference == "products"
        if sc.record_of(small).form == "module":
            assert sum(p.numel() for p in small.parameters()) == plan.predicted.params


class Bottleneck(nn.Module):
    def __init__(self, stride: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.Conv2d(8, 8, 3, stride, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16)),
        )
        self.short = nn.Conv2d(16, 16, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.short(x) + self.body(x))


def bottlenecks() -> nn.Module:
    """A small ResNet of bottlenecks."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        Bottleneck(),
        Bottleneck(2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 5),
    ).eval()


def test_a_plan_that_keeps_the_jump_and_removes_others_is_refused() -> None:
    pairs = factorise(several(), batches(), progress=False)
    graph = traced(pairs, MAPS.double())
    keep = np.ones(graph["up.first"].size, dtype=bool)
    keep[0] = False
    plan = sc.Plan.build(graph, {"up.first": keep}, allocator="hand")
    with pytest.raises(sc.PlanError, match=r"the last unit of up\.first to be removed before others"):
        sc.apply(pairs, plan)


def test_the_dense_model_and_others_are_refused() -> None:
    model = several()
    pairs = factorise(model, batches(), progress=False)
    plan = rank_plan(traced(pairs, MAPS.double()))
    small = sc.apply(pairs, plan)
    with pytest.raises(sc.PlanError, match=r"apply: expected .* Pass what sc\.factorise returned"):
        sc.apply(model, plan)
    with pytest.raises(sc.PlanError, match=r"verify: expected .* Pass what sc\.factorise returned"):
        sc.verify(model, small, plan)
    with pytest.raises(sc.PlanError, match=r"repair: expected .* Pass what sc\.factorise returned"):
        sc.repair(small, model, batches(), progress=False)
    with pytest.raises(sc.PlanError, match="of low rank already"):
        sc.apply(small, plan)
    with pytest.raises(sc.PlanError, match="expected the model it was made for"):
        sc.apply(nn.Sequential(nn.Linear(8, 8)), plan)


def test_casts_and_copies_of_a_factorised_model_work() -> None:
    pairs = factorise(several(torch.float32), batches(dtype=torch.float32), progress=False)
    plan = rank_plan(traced(pairs, MAPS), seed=1)
    half = copy.deepcopy(pairs).bfloat16()
    small = sc.apply(half, plan)
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    assert isinstance(pairs.get_submodule("up"), LowRank)
    assert not any("_dense" in vars(m) for m in small.modules())


def test_a_pair_reads_like_its_layer() -> None:
    model: Any = several()
    pairs = factorise(model, batches(), progress=False)
    for path in LAYERS:
        layer, pair = model.get_submodule(path), pairs.get_submodule(path)
        assert torch.allclose(pair.weight, layer.weight)
        assert (pair.bias is None) == (layer.bias is None)
        if layer.bias is not None:
            assert torch.allclose(pair.bias, layer.bias)
        sizes = (
            ("in_features", "out_features")
            if hasattr(layer, "in_features")
            else ("in_channels", "out_channels")
        )
        assert [getattr(pair, s) for s in sizes] == [getattr(layer, s) for s in sizes]
        with pytest.raises((KeyError, AttributeError, TypeError)):
            pair.weight = nn.Parameter(torch.zeros(2, 2))
    assert matrix_of(pairs.get_submodule("wide")).shape == (12, 8)


def test_a_pair_trains() -> None:
    pairs = factorise(several(), batches(), progress=False)
    small = sc.apply(pairs, rank_plan(traced(pairs, MAPS.double()), seed=1)).train()
    small(batches(1)[0]).square().mean().backward()
    assert all(p.grad is not None for pair in pairs_of(small).values() for p in pair.parameters())
    assert all(pair.training for pair in pairs_of(small).values())
