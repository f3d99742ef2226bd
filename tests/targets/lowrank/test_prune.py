"""Low rank in the whole pipeline: prune, repair, save, load, export, quantise, compare."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import secateur as sc
from secateur.integrations.shapes import reshape, shape_state
from secateur.targets.lowrank.factorise import factorise
from secateur.targets.lowrank.opened import as_asked, opened
from secateur.targets.lowrank.pair import LowRank, most_directions, pairs_of
from tests.targets.blocks.models import LIBRARIES
from tests.targets.blocks.models import make as build
from tests.targets.lowrank.models import LAYERS, MAPS, Several, batches, rank_plan, several

QUIET: dict[str, Any] = {"measure_latency": False, "progress": False}
DATA = batches(8, dtype=torch.float32)
BOTH = ("rank", ["unit", "rank"])


def make() -> nn.Module:
    return Several().eval()


def equal(one: nn.Module, other: nn.Module) -> bool:
    """Whether all parameters are the same."""
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.fixture(scope="module", params=["rank", "unit+rank"])
def result(request: pytest.FixtureRequest) -> sc.Result:
    rule = sc.RepairAware(per="params")
    return sc.prune(
        several(torch.float32), DATA, sc.Budget(params=0.75), rule, request.param.split("+"),
        "reconstruct", **QUIET,
    )  # fmt: skip


def test_the_budget_holds_and_the_proof_covers_it(result: sc.Result) -> None:
    dense = sum(p.numel() for p in several().parameters())
    found = sum(p.numel() for p in result.model.parameters())
    assert found == result.plan.predicted.params <= 0.75 * dense
    assert pairs_of(result.model)
    assert result.report.proof["reference"] == "products"
    assert result.report.proof["difference"] < 1e-9
    layers = dict(several().named_modules())
    assert all(pair.rank <= most_directions(layers[path]) for path, pair in pairs_of(result.model).items())
    assert "Layers that became two of low rank: " in result.report.note
    assert "with the products of the two layers as weights computes" in result.report.to_markdown()


def test_repair_helps(result: sc.Result) -> None:
    figures = {figure.stage: figure.loss for figure in result.report.figures}
    assert figures["repaired"] < figures["pruned"]


def test_saved_and_loaded(result: sc.Result, tmp_path: Path) -> None:
    loaded = sc.load(sc.save(result.model, tmp_path / "saved"), make)
    assert torch.equal(loaded(MAPS), result.model(MAPS))
    assert sc.record_of(loaded).plan == result.plan
    assert pairs_of(loaded).keys() == pairs_of(result.model).keys()
    with pytest.raises(sc.ArtefactError, match="expected the model it was made for"):
        sc.load(tmp_path / "saved", lambda: nn.Linear(2, 2))


@pytest.mark.parametrize("suffix", ["pt2", "onnx"])
def test_exported(result: sc.Result, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model.{suffix}"
    sc.export(result.model, path, MAPS)
    assert path.stat().st_size > 0


@pytest.mark.skipif("llama" not in LIBRARIES, reason="transformers is not installed")
def test_a_language_model_generates_and_stock_classes_are_refused(tmp_path: Path) -> None:
    model, inputs = build("llama")
    pairs = sc.factorise(model, [inputs], progress=False)
    small: Any = sc.apply(pairs, rank_plan(sc.trace(pairs, inputs, granularity="rank"), seed=1))
    options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": inputs["input_ids"] * 0 + 1}
    one, other = (
        small.generate(inputs["input_ids"], use_cache=cached, **options) for cached in (True, False)
    )
    assert torch.equal(one, other)
    with pytest.raises(sc.ExportError, match=r"LlamaConfig to give the model, but .* other tensors"):
        sc.export(small, tmp_path / "folder")


@pytest.mark.parametrize("granularity", BOTH)
def test_same_seed_same_plan(granularity: Any) -> None:
    one, other = (
        sc.prune(several(torch.float32), DATA, sc.Budget(params=0.8), "uniform", granularity, None, **QUIET)
        for _ in range(2)
    )
    assert one.plan.to_json() == other.plan.to_json()
    assert all(
        torch.equal(a, b) for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True)
    )


def test_repair_by_hand() -> None:
    model = several(torch.float32)
    pairs = sc.factorise(model, DATA, progress=False)
    graph: Any = sc.trace(pairs, MAPS, granularity="rank")
    small = sc.apply(pairs, rank_plan(graph, seed=1))
    better = sc.repair(small, pairs, DATA, "reconstruct", progress=False)
    before, after = (sc.evaluate(m, DATA, dense=model).loss for m in (small, better))
    assert after < before
    assert sc.record_of(better).plan == sc.record_of(small).plan
    assert sc.record_of(better).repairs[0]["kept"]
    assert sc.repair(small, pairs, DATA, None) is not small


def test_limits_speak_of_layers() -> None:
    result = sc.prune(
        several(torch.float32), DATA, sc.Budget(params=0.9), "uniform", "rank", None,
        limits=sc.Limits(ignore=("up",), round_to=2), **QUIET,
    )  # fmt: skip
    assert result.plan.ratios["up.first"] == 0
    ranks = [pair.rank for pair in pairs_of(result.model).values()]
    assert ranks
    assert all(rank % 2 == 0 for rank in ranks)


def test_rounds_are_refused() -> None:
    with pytest.raises(sc.SettingError, match=r"prune\(steps=2\): expected no such setting with gran"):
        sc.prune(several(torch.float32), DATA, sc.Budget(params=0.9), granularity="rank", steps=2, **QUIET)


def test_rules_and_budgets_are_compared() -> None:
    found = sc.compare(
        several(torch.float32), DATA, ("repair_aware", "uniform"), [sc.Budget(params=0.8)],
        granularity="rank", repair=None, progress=False,
    )  # fmt: skip
    assert {outcome.rule for outcome in found.outcomes} == {"repair_aware", "uniform"}
    assert all(outcome.cost.params <= 0.8 * found.cost.params for outcome in found.outcomes)


def test_a_bound_on_quality_is_met() -> None:
    found = sc.prune(
        several(torch.float32), [(x, torch.arange(6) % 5) for x in batches(12, dtype=torch.float32)],
        sc.Budget(loss_rise=0.5), "uniform", "rank", None, **QUIET,
    )  # fmt: skip
    assert found.plan.predicted.params <= found.plan.dense.params


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    asked: Any = (sc.Budget(params=0.8), "repair_aware", ["unit", "rank"], "reconstruct")
    one = sc.prune(several(torch.float32), DATA, *asked, checkpoint=tmp_path / "kept", **QUIET)
    other = sc.prune(several(torch.float32), DATA, *asked, checkpoint=tmp_path / "kept", **QUIET)
    assert all(
        torch.equal(a, b) for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True)
    )


def test_layers_without_losses_are_the_dense_ones() -> None:
    model = several(torch.float32)
    pairs = factorise(model, DATA, progress=False)
    graph: Any = sc.trace(pairs, MAPS, granularity="rank")
    keep = {"up.first": np.arange(graph["up.first"].size) < 4}
    small: Any = sc.apply(pairs, sc.Plan.build(graph, keep, allocator="hand"))
    assert isinstance(small.up, LowRank)
    for path in LAYERS:
        if path != "up":
            assert type(small.get_submodule(path)) is type(model.get_submodule(path))
            assert torch.equal(small.get_submodule(path).weight, model.get_submodule(path).weight)  # type: ignore[arg-type]


@pytest.mark.parametrize("granularity", BOTH)
def test_training_can_go_on_from_a_checkpoint(granularity: Any) -> None:
    pairs = factorise(several(torch.float32), DATA, progress=False)
    small = sc.apply(pairs, rank_plan(sc.trace(pairs, MAPS, granularity=granularity), seed=1))
    fresh = make()
    reshape(fresh, shape_state(small))
    fresh.load_state_dict(small.state_dict())
    assert torch.equal(fresh(MAPS), small(MAPS))
    assert pairs_of(fresh).keys() == pairs_of(small).keys()


def test_groups_that_were_left_whole_keep_the_names_of_the_plan() -> None:
    """``up`` is one layer in the opened model, so its outputs have another name there."""
    pairs = factorise(several(torch.float32), DATA, progress=False)
    graph: Any = sc.trace(pairs, MAPS, granularity=["unit", "rank"])
    keep = {"up.second": np.arange(24) < 20, "down.first": np.arange(graph["down.first"].size) < 3}
    plan = sc.Plan.build(graph, keep, allocator="hand")
    found = opened(pairs, plan)
    assert found.names["up.second"] == "up"
    assert [group.name for group in found.plan.groups if group.removed] == ["up", "down.first"]
    whole = [
        g.model_copy(update={"removed": (), "slices": ()}) if g.name == "up" else g for g in found.plan.groups
    ]
    done = as_asked(found, found.plan.model_copy(update={"groups": tuple(whole)}), plan)
    assert done.ratios["up.second"] == 0
    assert done.ratios["down.first"] == plan.ratios["down.first"] > 0
    assert as_asked(found, found.plan, plan) is plan
