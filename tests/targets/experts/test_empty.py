"""Loading into a model whose weights take no memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.targets.experts.empty import empty_weights
from tests.targets.experts.models import PlainLM, library, make, words
from tests.targets.experts.test_apply import logits, masks, plan_of


@pytest.mark.parametrize("family", ["qwen2", "deepseek", "gptoss", "plain"])
def test_loaded_bit_for_bit_without_dense_weights(family: str, tmp_path: Path) -> None:
    model, ids = make(family), words()
    graph = sc.trace(model, ids, granularity="expert")
    small = sc.apply(model, plan_of(graph, masks(graph, seed=2)), graph=graph)
    sc.save(small, tmp_path)
    made = []

    def make_empty() -> nn.Module:
        with empty_weights():
            made.append(
                PlainLM() if family == "plain" else library().AutoModelForCausalLM.from_config(model.config)
            )
        return made[0]

    loaded = sc.load(tmp_path, make_empty).eval()
    assert all(p.is_meta for p in made[0].parameters())
    assert not any(t.is_meta for t in (*loaded.parameters(), *loaded.buffers()))
    assert torch.equal(logits(loaded, ids), logits(small, ids))
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in small.parameters()]


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    def tied() -> PlainLM:
        model = PlainLM()
        model.head.weight = model.embed.weight
        return model

    torch.manual_seed(0)
    model, ids = tied().eval(), words()
    graph = sc.trace(model, ids, granularity="expert")
    small = sc.apply(model, plan_of(graph, masks(graph, seed=2)), graph=graph)
    sc.save(small, tmp_path)
    with empty_weights():
        empty = tied().eval()
    assert empty.head.weight is empty.embed.weight
    loaded = sc.load(tmp_path, lambda: empty)
    assert loaded.head.weight is loaded.embed.weight
    assert torch.equal(logits(loaded, ids), logits(small, ids))


def test_a_buffer_that_nothing_can_fill_is_refused_by_name(tmp_path: Path) -> None:
    class Scaled(PlainLM):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.ones(1), persistent=False)

    torch.manual_seed(0)
    model = Scaled().eval()
    graph = sc.trace(model, words(), granularity="expert")
    sc.save(sc.apply(model, plan_of(graph, masks(graph, seed=2)), graph=graph), tmp_path)
    with pytest.raises(
        sc.ArtefactError, match=r"got scale on the meta device. Make the model inside secateur.empty_w"
    ):
        sc.load(tmp_path, lambda: Scaled().to("meta"))
    assert nn.Linear(2, 2).weight.device.type == "cpu"
