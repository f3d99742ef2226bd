"""What is written is what stock classes load; what a configuration cannot say is refused with what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import secateur as sc
from secateur.targets.units.compare import relative_difference, run
from tests.artefact.export.families import FAMILIES, FAST, WORDS, Family, pruned
from tests.targets.units.plans import plan_of
from tests.zoo.importing import import_transformers

pytestmark = pytest.mark.skipif(import_transformers() is None, reason="transformers is not installed")
NAMES = [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in FAMILIES]


def assert_same(stock: nn.Module, small: nn.Module, family: Family) -> None:
    """Compare at a batch size and a length that neither trace nor export has seen."""
    inputs = family.example(4, 6, 5)
    assert relative_difference(run(stock, (), inputs), run(small, (), inputs)) < 1e-5


def reloaded(small: nn.Module, folder: Path) -> Any:
    return type(small).from_pretrained(folder).eval()  # type: ignore[attr-defined]


@pytest.mark.parametrize("what", ["neurons", "heads"])
@pytest.mark.parametrize("name", NAMES)
def test_round_trip_with_the_stock_class(tmp_path: Path, name: str, what: str) -> None:
    family = FAMILIES[name]
    small, said = pruned(name, {what: 0.5}), getattr(family, what)
    if said is None:
        with pytest.raises(
            sc.ExportError, match=r"no field of it does: these heads .* no head_dim"
        ) as caught:
            sc.export(small, tmp_path / "small")
        assert "sc.Limits(ignore=(" in str(caught.value)
        assert "secateur.save" in str(caught.value)
        assert len(str(caught.value)) - len(str(tmp_path)) <= 600
        assert list(tmp_path.iterdir()) == []
        assert small.config.to_dict() == pruned(name, {"neurons": 0}).config.to_dict()
        note = sc.record_of(small).note
        assert "from_pretrained refuses the folder that save_pretrained writes: use sc.save" in note
        small.save_pretrained(tmp_path / "own")
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):  # what the note says
            reloaded(small, tmp_path / "own")
        return
    assert "from_pretrained" not in sc.record_of(small).note
    done = sc.export(small, tmp_path / "small")
    assert done.runtime == "transformers"
    assert len(done.batches) >= 2
    stock = reloaded(small, tmp_path / "small")
    assert {field: getattr(stock.config, field) for field in said} == said
    assert_same(stock, small, family)
    changed = {k.removeprefix("config."): v for k, v in sc.record_of(small).sizes.items()}
    assert {k: v for k, v in changed.items() if k in said}.items() <= said.items()


def test_heads_and_neurons_together_twice_with_a_card(tmp_path: Path) -> None:
    small = pruned("llama", {"neurons": 0.25, "heads": 0.5})
    for _ in range(2):  # an earlier export is replaced
        sc.export(small, tmp_path / "small")
    stock = reloaded(small, tmp_path / "small")
    assert (stock.config.intermediate_size, stock.config.num_attention_heads) == (36, 2)
    assert_same(stock, small, FAMILIES["llama"])
    card = (tmp_path / "small" / "README.md").read_text()
    assert "pipeline_tag: text-generation" in card
    assert "LlamaForCausalLM.from_pretrained" in card
    assert [p.name for p in tmp_path.iterdir()] == ["small"]
    sc.export(small, tmp_path / "small", card="# mine\n")
    assert (tmp_path / "small" / "README.md").read_text() == "# mine\n"


def test_saved_and_loaded_before(tmp_path: Path) -> None:
    small = pruned("vit", {"heads": 0.5})
    loaded: Any = sc.load(sc.save(small, tmp_path / "saved"), FAMILIES["vit"].make)
    assert loaded.config.to_dict() == small.config.to_dict()
    sc.export(loaded, tmp_path / "small")
    assert_same(reloaded(loaded, tmp_path / "small"), small, FAMILIES["vit"])


def test_half_precision(tmp_path: Path) -> None:
    small = pruned("llama", {"heads": 0.5}).bfloat16()
    sc.export(small, tmp_path / "small")
    assert reloaded(small, tmp_path / "small").dtype == torch.bfloat16


def test_shapes_alone_do_not_pass(tmp_path: Path) -> None:
    """A model with heads of half the size has the same tensors as one with half of the heads."""
    small = pruned("llama", {"heads": 0.5})
    small.config.num_attention_heads, small.config.num_key_value_heads, small.config.head_dim = 4, 2, 4
    with pytest.raises(sc.ExportError, match=r"largest difference of \d"):
        sc.export(small, tmp_path / "small")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "gone", "words"),
    [
        ("llama", {"neurons": (0.5, 0.25)}, r"its intermediate_size can only be the same .* keep 24 and 36 "),
        (
            "llama",
            {"heads": (0.5, 0)},
            r"its num_attention_heads, num_key_value_heads and 1 more can only be",
        ),
        pytest.param(
            *("dinov2", {"neurons": 0.25}, r"its mlp_ratio cannot: .* int.* Keep a multiple of 32 units"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_sizes_that_the_configuration_cannot_say_are_refused(
    tmp_path: Path, name: str, gone: Any, words: str
) -> None:
    small = pruned(name, gone)
    with pytest.raises(sc.ExportError, match=words) as caught:
        sc.export(small, tmp_path / "small")
    assert len(str(caught.value)) - len(str(tmp_path)) <= 600
    assert list(tmp_path.iterdir()) == []
    assert "sc.load" in sc.model_card(small)
    loaded = sc.load(sc.save(small, tmp_path / "saved"), FAMILIES[name].make)
    inputs = FAMILIES[name].example(3, 6, 4)
    assert relative_difference(run(loaded, (), inputs), run(small, (), inputs)) == 0


def layered() -> Any:
    """Classes that read what single layers have otherwise, as some of Transformers' own do."""
    library: Any = import_transformers()

    class LayeredConfig(library.PreTrainedConfig):
        model_type = "layered"

        def __init__(self, width: int = 8, intermediate_size: int = 12, **more: Any) -> None:
            self.width, self.intermediate_size, self.num_hidden_layers = width, intermediate_size, 3
            super().__init__(**more)

    class Block(nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.up = nn.Linear(config.width, config.intermediate_size)
            self.down = nn.Linear(config.intermediate_size, config.width)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.down(torch.relu(self.up(x)))

    class Layered(library.PreTrainedModel):
        config_class = LayeredConfig

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.words = nn.Embedding(WORDS, config.width)
            configs = [config.per_layer_config[k] for k in range(config.num_hidden_layers)]
            self.blocks = nn.ModuleList(map(Block, configs))
            self.post_init()

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            hidden = self.words(input_ids)
            for block in self.blocks:
                hidden = block(hidden)
            return hidden

    return lambda: Layered(LayeredConfig()).eval()


def test_layers_that_differ_have_a_configuration_each_where_it_is_read(tmp_path: Path) -> None:
    if not hasattr(import_transformers().PreTrainedConfig, "per_layer_config"):  # type: ignore[union-attr]
        pytest.skip("this version of Transformers has one configuration for all layers")
    make = layered()
    ids = torch.randint(WORDS, (2, 5))
    model = make()
    graph = sc.trace(model, {"input_ids": ids})
    keep = {f"blocks.{k}.up": np.arange(12) >= gone for k, gone in enumerate((5, 0, 2))}
    small = sc.apply(model, plan_of(graph, keep), graph=graph, example_inputs={"input_ids": ids})
    sc.save(small, tmp_path / "saved")
    for made in (small, sc.load(tmp_path / "saved", make)):
        sc.export(made, tmp_path / "small")
        stock = reloaded(made, tmp_path / "small")
        said = [config.intermediate_size for config in stock.config.per_layer_config]
        assert said == [block.up.out_features for block in stock.blocks] == [7, 12, 10]
        assert torch.equal(stock(ids[:, :3]), made(ids[:, :3]))
    assert not model.config.is_heterogeneous


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    small = pruned("vit", {"neurons": 0.5})
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(sc.SettingError, match="other files in it"):
        sc.export(small, tmp_path)
    with pytest.raises(sc.SettingError, match="has no save_pretrained"):
        sc.export(torch.nn.Linear(2, 2), tmp_path / "folder", torch.zeros(1, 2))
