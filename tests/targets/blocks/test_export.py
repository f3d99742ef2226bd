"""What stock Transformers loads, and what text it generates, after blocks were dropped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import secateur as sc
from secateur.targets.units.compare import relative_difference, run
from tests.targets.blocks.models import IDS, LIBRARIES, make

NAMES = [
    name for name in ("llama", "qwen3", "gemma3", "gpt2", "bert", "vit", "qwen2_moe") if name in LIBRARIES
]
pytestmark = pytest.mark.skipif(not NAMES, reason="transformers is not installed")


def smaller(name: str) -> Any:
    """Without the second and the last block."""
    model, inputs = make(name)
    graph: Any = sc.trace(model, inputs, granularity="block")
    (group,) = graph.groups
    keep = np.ones(group.size, dtype=bool)
    keep[[1, -1]] = False
    return sc.apply(model, sc.Plan.build(graph, {group.name: keep}, allocator="hand"), graph=graph)


@pytest.mark.parametrize("name", NAMES)
def test_the_stock_class_loads_what_is_left(tmp_path: Path, name: str) -> None:
    small, inputs = smaller(name), make(name)[1]
    sc.export(small, tmp_path / "out")
    stock = type(small).from_pretrained(tmp_path / "out").eval()
    assert relative_difference(run(stock, (), inputs), run(small, (), inputs)) < 1e-5
    config = stock.config
    assert config.num_hidden_layers == small.config.num_hidden_layers == (5 if name == "gemma3" else 2)
    assert len(getattr(config, "layer_types", None) or range(2)) in (2, config.num_hidden_layers)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("bert", "vit")])
def test_text_is_generated_with_a_cache_as_without_one(name: str) -> None:
    small = smaller(name)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "attention_mask": IDS * 0 + 1}
    with torch.no_grad():
        found = [small.generate(IDS, use_cache=cached, **options) for cached in (True, False)]
    assert torch.equal(*found)
