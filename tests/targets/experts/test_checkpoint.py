"""Checkpoints: stock Transformers loads them, and rewriting on disk gives what removing in memory gives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import secateur as sc
from secateur.cli.main import app
from secateur.plan import Plan
from secateur.targets.experts.checkpoint import PLAN, prune_checkpoint, pruned_config, save_pretrained
from tests.targets.experts.models import CONFIGS, library, make, words
from tests.targets.experts.test_apply import logits, masks, plan_of
from tests.targets.headsizes.models import ROWS, network
from tests.targets.units.plans import random_plan


def pruned(family: str, *, equal: bool) -> tuple[torch.nn.Module, torch.nn.Module, Plan]:
    model = make(family)
    graph = sc.trace(model, words(), granularity="expert")
    plan = plan_of(graph, masks(graph, seed=4, equal=equal))
    return model, sc.apply(model, plan, graph=graph), plan


def stock(folder: Path) -> torch.nn.Module:
    return library().AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("family", CONFIGS)
def test_stock_transformers_loads_equal_counts_bit_for_bit(family: str, tmp_path: Path) -> None:
    _, small, plan = pruned(family, equal=True)
    save_pretrained(small, tmp_path / "small")
    assert torch.equal(logits(stock(tmp_path / "small"), words()), logits(small, words()))
    assert Plan.from_json(tmp_path / "small" / PLAN) == plan


@pytest.mark.parametrize("family", CONFIGS)
def test_on_disk_is_as_in_memory(family: str, tmp_path: Path) -> None:
    model, small, plan = pruned(family, equal=True)
    model.save_pretrained(tmp_path / "dense", max_shard_size="40KB")
    assert len(list((tmp_path / "dense").glob("*.safetensors"))) > 2
    prune_checkpoint(tmp_path / "dense", plan, tmp_path / "small")
    assert torch.equal(logits(stock(tmp_path / "small"), words()), logits(small, words()))
    index = json.loads((tmp_path / "small" / "model.safetensors.index.json").read_text())
    held = {n: f.name for f in (tmp_path / "small").glob("*.safetensors") for n in load_file(f)}
    assert index["weight_map"] == held
    files = {f.name for f in (tmp_path / "dense").iterdir()}
    assert {f.name for f in (tmp_path / "small").iterdir()} == files | {PLAN}


@pytest.mark.parametrize("family", ["mixtral", "deepseek", "gptoss"])
def test_unequal_counts_on_disk_have_the_tensors_of_unequal_counts_in_memory(
    family: str, tmp_path: Path
) -> None:
    model, small, plan = pruned(family, equal=False)
    model.save_pretrained(tmp_path / "dense")
    prune_checkpoint(tmp_path / "dense", plan, tmp_path / "small")
    small.save_pretrained(tmp_path / "expected")
    got, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("small", "expected"))
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    count = "n_routed_experts" if family == "deepseek" else "num_local_experts"
    assert config[count] == 8
    # Dense layers, such as DeepSeek's first, have no experts to count.
    kept = {group.name.split(".")[2]: group.kept for group in plan.groups}
    assert len(set(kept.values())) == 2
    assert config["per_layer_config"] == {layer: {count: n} for layer, n in kept.items()}


@pytest.mark.parametrize("family", ["qwen2", "deepseek"])
def test_any_rule_gives_what_stock_transformers_loads(family: str, tmp_path: Path) -> None:
    model = make(family)
    graph = sc.trace(model, words(), granularity="expert")
    scores = sc.score(graph, [words()], ("frequency", "reap"))
    rule = sc.ToD(removal="frequency", protection="reap")
    plan = sc.EqualCounts(rule).allocate(graph, scores, sc.Budget(experts=0.7))
    small = sc.apply(model, plan, graph=graph)
    save_pretrained(small, tmp_path / "small")
    assert torch.equal(logits(stock(tmp_path / "small"), words()), logits(small, words()))


def test_counts_in_a_part_of_the_configuration() -> None:
    _, _, plan = pruned("qwen2", equal=True)
    config = {"num_experts_per_tok": 8, "text_config": {"num_experts": 8, "n_shared_experts": 8}}
    assert pruned_config(config, plan) == {
        "num_experts_per_tok": 8,
        "text_config": {"num_experts": 3, "n_shared_experts": 8},
    }


def test_unequal_counts_are_refused_for_stock_transformers(tmp_path: Path) -> None:
    _, small, _ = pruned("qwen2", equal=False)
    with pytest.raises(sc.SettingError, match=r"expected equally many experts in all blocks, got \[2, 3\]"):
        save_pretrained(small, tmp_path / "small")
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_pruned_by_experts_is_sent_elsewhere(tmp_path: Path) -> None:
    model = network("eager")
    graph = sc.trace(model, ROWS, granularity="head_size")
    small = sc.apply(model, random_plan(graph), graph=graph)
    with pytest.raises(sc.SettingError, match=r"a model without some experts, .* Use secateur.export"):
        save_pretrained(small, tmp_path / "small")


def test_another_checkpoint_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    _, _, plan = pruned("mixtral", equal=True)
    make("qwen3").save_pretrained(tmp_path / "dense")
    with pytest.raises(
        sc.ArtefactError, match=r"expected a router with 8 rows and 8 experts for model.layers.0.mlp"
    ):
        prune_checkpoint(tmp_path / "dense", plan, tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_dense_weights_in_another_format_are_left_out(tmp_path: Path) -> None:
    model, _, plan = pruned("qwen2", equal=True)
    dense = tmp_path / "dense"
    model.save_pretrained(dense)
    (dense / "vocab.txt").write_text("a b")
    with (dense / "pytorch_model.bin").open("wb") as file:
        file.truncate(1 << 36)  # a hole
    with pytest.warns(UserWarning, match=r"left out pytorch_model\.bin"):
        found = prune_checkpoint(dense, plan, tmp_path / "out")
    assert (found / "vocab.txt").read_text() == "a b"
    assert not (found / "pytorch_model.bin").exists()


def test_missing_and_damaged_files_are_refused(tmp_path: Path) -> None:
    model, _, plan = pruned("mixtral", equal=True)
    with pytest.raises(sc.ArtefactError, match=r"expected model.safetensors, got none"):
        prune_checkpoint(tmp_path, plan, tmp_path / "small")
    model.save_pretrained(tmp_path / "dense")
    with pytest.raises(sc.ArtefactError, match="expected a new or empty folder"):
        prune_checkpoint(tmp_path / "dense", plan, tmp_path / "dense")
    (tmp_path / "dense" / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(sc.ArtefactError, match="expected a safetensors file"):
        prune_checkpoint(tmp_path / "dense", plan, tmp_path / "small")


def test_the_command(tmp_path: Path) -> None:
    model, _, plan = pruned("mixtral", equal=True)
    model.save_pretrained(tmp_path / "dense")
    plan.to_json(tmp_path / "plan.json")
    arguments = ["prune-checkpoint", str(tmp_path / "dense"), "--plan", str(tmp_path / "plan.json"), "--out"]
    done = CliRunner().invoke(app, [*arguments, str(tmp_path / "small")])
    assert done.exit_code == 0, done.output
    assert "6 of 16 experts kept in 2 blocks" in done.output
    assert CliRunner().invoke(app, [*arguments, str(tmp_path / "small")]).exit_code == 2
