"""A language model of a billion parameters, traced, planned and costed without any of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import secateur as sc
from tests.zoo.importing import import_transformers


@pytest.mark.slow
def test_a_billion_parameters_on_the_meta_device() -> None:
    transformers = import_transformers()
    if transformers is None:
        pytest.skip("transformers is not installed: make test installs it")
    config = transformers.LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22,
        num_attention_heads=32, num_key_value_heads=4,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    tokens = torch.zeros(2, 128, dtype=torch.int64, device="meta")
    graph = sc.trace(model, {"input_ids": tokens})
    assert [g.size for g in graph.groups] == [4, 5632] * 22
    keep = {g.name: np.arange(g.size) >= g.size // 4 for g in graph.groups}
    plan = sc.Plan.build(graph, keep, allocator="test")
    assert plan.dense.params == sum(p.numel() for p in model.parameters()) > 1e9
    heads, mlp = 3 / 4, 3 / 4
    block = heads * (2 * 2048 * 2048 + 2 * 2048 * 256) + mlp * 3 * 2048 * 5632 + 2 * 2048
    assert plan.predicted.params == 22 * block + 2 * 32000 * 2048 + 2048
