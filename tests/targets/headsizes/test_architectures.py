"""Whole transformers without some dimensions of their heads compute what the masked ones compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import secateur as sc
from tests.targets.units.plans import random_plan
from tests.zoo import timm_models, transformers_models

QUERIES = {
    "llama": 1,  # one group for both layers, which share the frequencies of the rotary embedding
    "qwen3": 0,  # normed
    "gemma": 1,
    "phi": 3,  # dimensions that are not turned are groups of their own
    "phi3": 1,
    "gpt2": 2,
    "bert": 2,
    "vit": 2,
    "t5": 6,
    "falcon": 1,  # its one layer of queries, keys and values ties these, and the rotary embedding both layers
    "deit": 2,
    "deit_tiny_distilled_patch16_224": 12,
}
"""How many groups queries and keys form, in two layers."""

DEIT = transformers_models._model(
    "deit",
    "DeiTConfig",
    "DeiTForImageClassification",
    transformers_models._pixels,
    **transformers_models._VISION,
)
ENTRIES = {entry.name: entry for entry in (*transformers_models.MODELS, *timm_models.MODELS, DEIT)}


@pytest.mark.slow
@pytest.mark.parametrize("name", QUERIES)
def test_pruned_equals_masked(name: str) -> None:
    entry = ENTRIES[name]
    if not entry.available():
        pytest.skip(f"{entry.family} is not installed")
    model = entry.make()
    example: Any = entry.example(2, torch.Generator().manual_seed(0))
    graph = sc.trace(model, example, granularity="head_size")
    matched = [group for group in graph.groups if group.of_role("match")]
    assert len(matched) == QUERIES[name]
    assert any(group.of_role("consume") for group in graph.groups)
    for seed in range(2):
        plan = random_plan(graph, ratio=0.25 + 0.25 * seed, seed=seed)
        small = sc.apply(model, plan, graph=graph)
        assert sc.record_of(small).form == ("graph" if name == "phi3" else "module")
        proof = sc.verify(model, small, plan)
        assert proof.difference <= 1e-9
        assert proof.proven
