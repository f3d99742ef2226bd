"""Heads without some dimensions compute what the model with zeros there computes, at the dense scale."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.targets.units.apply import Applier
from secateur.targets.units.compare import relative_difference, run
from tests.targets.headsizes.models import ATTENTIONS, ROWS, SIZE, WIDTH, Fused, network
from tests.targets.units.plans import plan_of, random_plan

ANY = sorted(ATTENTIONS)


@functools.cache
def traced(name: str) -> tuple[nn.Module, sc.Graph, Applier]:
    """A network, its trace, and what applies plans to it."""
    model = network(name, dtype=torch.float64)
    graph = sc.trace(model, ROWS.double(), granularity="head_size")
    return model, graph, Applier(model, graph)


@pytest.mark.parametrize("name", ANY)
def test_pruned_equals_masked(name: str) -> None:
    model, graph, apply = traced(name)
    x = torch.randn(2, 7, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for seed in range(3):
        plan = random_plan(graph, ratio=0.2 + 0.2 * seed, seed=seed)
        wanted = run(apply(plan, "masked"), (x,), {})
        for form in ("graph", "module"):
            small = apply(plan, form)  # type: ignore[arg-type]
            assert relative_difference(run(small, (x,), {}), wanted) <= 1e-9
        assert sc.verify(model, small, plan).difference <= 1e-9


@pytest.mark.parametrize("name", ANY)
def test_the_reference_is_not_the_dense_model(name: str) -> None:
    model, graph, apply = traced(name)
    for group in graph.groups:
        keep = {group.name: random_plan(graph).keep[group.name]}
        masked = apply(plan_of(graph, keep), "masked")
        assert relative_difference(run(masked, (ROWS.double(),), {}), run(model, (ROWS.double(),), {})) > 1e-6


def test_the_scale_is_that_of_the_dense_heads() -> None:
    """Literally: with the first two dimensions of queries and keys, at 1 / sqrt(6)."""
    torch.manual_seed(0)
    model = nn.Sequential(Fused()).double().eval()
    graph = sc.trace(model, ROWS.double(), granularity="head_size")
    keep = torch.tensor([True, True] + [False] * (SIZE - 2)).numpy()
    small = sc.apply(model, plan_of(graph, {"0.q": keep}), graph=graph)
    layer: Any = model[0]
    q, k, v = layer.heads(ROWS.double())
    logits = q[..., :2] @ k[..., :2].transpose(-2, -1) / math.sqrt(SIZE)
    logits = logits.masked_fill(torch.ones(5, 5).triu(1).bool(), -math.inf)
    wanted = ROWS + layer.o((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))
    assert relative_difference([small(ROWS.double())], [wanted]) <= 1e-12


def test_saved_loaded_and_repaired(tmp_path: Path) -> None:
    model = network("rotary")
    graph = sc.trace(model, ROWS, granularity="head_size")
    plan = random_plan(graph)
    small = sc.apply(model, plan, graph=graph)
    data = [torch.randn(8, 5, WIDTH) for _ in range(4)]
    repaired = sc.repair(small, model, data, "reconstruct", progress=False)  # which traces the model itself
    sc.save(repaired, tmp_path / "small")
    again = sc.load(tmp_path / "small", lambda: network("rotary"))
    assert torch.equal(again(ROWS), repaired(ROWS))
    plan.to_json(tmp_path / "plan.json")
    known = sc.Plan.from_json(tmp_path / "plan.json")
    assert torch.equal(sc.apply(model, known)(ROWS), small(ROWS))


def test_onnx(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = network("fused")
    graph = sc.trace(model, ROWS, granularity="head_size")
    sc.export(sc.apply(model, random_plan(graph), graph=graph), tmp_path / "small.onnx", ROWS)
    assert (tmp_path / "small.onnx").exists()  # it was run there and compared before it was written
