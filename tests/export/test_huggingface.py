from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import secateur as sc
from tests.apply.plans import plan_of
from tests.zoo.transformers_models import MODELS

LLAMA = next(entry for entry in MODELS if entry.name == "llama")
pytestmark = pytest.mark.skipif(not LLAMA.available(), reason="transformers is not installed")


def pruned(*gone: int) -> tuple[Any, dict[str, Any]]:
    """A Llama whose two blocks lost so many hidden units."""
    model = LLAMA.construct().eval()
    inputs: Any = LLAMA.example(2, torch.Generator().manual_seed(0))
    graph = sc.trace(model, inputs)
    wide = [g for g in graph.groups if "gate_proj" in g.name]
    keep = {g.name: np.arange(g.size) >= n for g, n in zip(wide, gone, strict=True)}
    return sc.apply(model, plan_of(graph, keep), graph=graph, example_inputs=inputs), inputs


def test_round_trip_with_the_stock_class(tmp_path: Path) -> None:
    small, inputs = pruned(32, 32)
    for _ in range(2):  # an earlier export is replaced
        done = sc.export(small, tmp_path / "small", inputs)
    assert (done.runtime, done.difference) == ("transformers", 0.0)
    stock = type(small).from_pretrained(tmp_path / "small").eval()
    assert stock.config.intermediate_size == 64
    with torch.no_grad():
        assert torch.equal(stock(**inputs).logits, small(**inputs).logits)
    card = (tmp_path / "small" / "README.md").read_text()
    assert "pipeline_tag: text-generation" in card
    assert "LlamaForCausalLM.from_pretrained" in card
    assert [p.name for p in tmp_path.iterdir()] == ["small"]
    sc.export(small, tmp_path / "small", inputs, card="# mine\n")
    assert (tmp_path / "small" / "README.md").read_text() == "# mine\n"


def test_sizes_that_the_configuration_cannot_say_are_refused(tmp_path: Path) -> None:
    small, inputs = pruned(32, 16)
    with pytest.raises(
        sc.ExportError, match="its intermediate_size can only be the same in all layers, which keep 64 and 80"
    ):
        sc.export(small, tmp_path / "small", inputs)
    assert list(tmp_path.iterdir()) == []
    assert "sc.load" in sc.model_card(small)


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    small, inputs = pruned(32, 32)
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(sc.SettingError, match="other files in it"):
        sc.export(small, tmp_path, inputs)
    with pytest.raises(sc.SettingError, match="has no save_pretrained"):
        sc.export(torch.nn.Linear(2, 2), tmp_path / "folder", torch.zeros(1, 2))
