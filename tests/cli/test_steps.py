"""The pipeline step by step gives what `secateur prune` gives."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import secateur as sc
from tests.cli.conftest import refused, run

BASE = ("--model", "net.py:make", "--data", "x.npz", "--batch-size", "8", "--seed", "3")


def done(*arguments: str) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize(
    ("rule", "methods"),
    [
        (("--allocator", "tod", "--removal", "activation", "--protection", "l2"), "auto"),
        (("--allocator", "repairability", "--removal", "l2"), "reconstruct,batchnorm"),
        (("--allocator", "uniform", "--removal", "random"), "variance"),
    ],
)
@pytest.mark.parametrize("form", ["module", pytest.param("graph", marks=pytest.mark.slow)])
# torch warns of its own internals when an exported program is copied.
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_step_by_step_equals_prune(folder: Path, rule: tuple[str, ...], methods: str, form: str) -> None:
    # Without labels, nearness to the dense model judges: then a repair of random weights helps too.
    np.savez("bare.npz", x=np.load("x.npz")["x"])
    asked, base = (*rule, "--macs", "0.5"), (*BASE, "--data", "bare.npz")
    done("prune", *base, *asked, "--repair", methods, "--form", form, "--out", "whole")
    done("score", *base, *rule, "--out", "s.safetensors")
    done("plan", *base, *asked, "--scores", "s.safetensors", "--out", "plan.json")
    done("apply", *base, "--plan", "plan.json", "--form", form, "--out", "small")
    done("repair", *base, "--artefact", "small", "--repair", methods, "--out", "fixed")
    whole, fixed = (json.loads((folder / out / "secateur.json").read_text()) for out in ("whole", "fixed"))
    assert whole["plan"] == fixed["plan"] == json.loads((folder / "plan.json").read_text())
    assert whole == fixed  # the tensors' checksum among it
    assert any(each["kept"] for each in whole["repairs"])
    before, after = (load_file(folder / out / "model.safetensors") for out in ("small", "fixed"))
    assert any(not before[name].equal(after[name]) for name in before)


def test_single_weights_step_by_step(folder: Path) -> None:
    base = (*BASE, "--granularity", "weight")
    asked = ("--allocator", "repairability", "--sparsity", "0.6", "--removal", "wanda")
    done("prune", *base, *asked, "--repair", "reconstruct", "--out", "whole")
    done("score", *base, "--signals", "wanda", "--out", "s.safetensors")
    text = done("plan", *base, *asked, "--scores", "s.safetensors", "--out", "masks.safetensors")
    assert text.startswith("masks by repairability, seed 3")
    plan = sc.MaskPlan.load(folder / "masks.safetensors")
    found = json.loads(done("apply", *BASE, "--plan", "masks.safetensors", "--out", "small", "--json"))
    assert found["form"] == "masked"
    assert found["dense"]["params"] - found["pruned"]["params"] == plan.removed > 0
    assert found["proof"]["reference"] == "masks"
    small = load_file(folder / "small" / "model.safetensors")
    assert all((small[name] == 0).equal(torch.tensor(~mask)) for name, mask in plan.masks.items())
    done("repair", *BASE, "--artefact", "small", "--repair", "reconstruct", "--out", "fixed")
    whole, fixed = (json.loads((folder / out / "secateur.json").read_text()) for out in ("whole", "fixed"))
    assert whole == fixed  # the tensors' checksum among it
    line = refused(2, "apply", "--model", "net.py:make", "--plan", "masks.safetensors", "--out", "none")
    assert "expected --input or --data, got neither" in line
    line = refused(2, "plan", *BASE, *asked[:2], "--scores", "s.safetensors", "--out", "p.json")
    assert "signal wanda" in line


def test_ranks_step_by_step(folder: Path) -> None:
    base = (*BASE, "--granularity", "rank")
    asked = ("--allocator", "uniform", "--removal", "magnitude", "--params", "0.99")
    shown = done("inspect", *base)
    assert "3 directions in 1 groups may be removed. With a rank of 1 left in each" in shown
    assert "7.first" in shown
    found = json.loads(done("prune", *base, *asked, "--repair", "none", "--out", "whole", "--json"))
    assert found["asked"]["granularity"] == "rank"
    done("score", *base, "--signals", "magnitude", "--out", "s.safetensors")
    done("plan", *base, *asked, "--scores", "s.safetensors", "--out", "plan.json")
    found = json.loads(done("apply", *BASE, "--plan", "plan.json", "--out", "small", "--json"))
    assert found["proof"]["reference"] == "products"
    assert found["proof"]["difference"] <= 1e-9
    assert found["dense"]["params"] - found["pruned"]["params"] == 39 - 19
    assert load_file(folder / "small" / "model.safetensors")["7.first.weight"].shape == (1, 12)
    line = refused(2, "repair", *BASE, "--artefact", "small", "--out", "fixed")
    assert "got layers of low rank" in line


def test_scores_are_for_planning_again(folder: Path) -> None:
    found = json.loads(
        done("score", *BASE, "--signals", "magnitude,l1*l2", "--out", "s.safetensors", "--json")
    )
    assert set(found["signals"]) == {"magnitude", "l1*l2", "l1", "l2"}
    scores = sc.Scores.load(folder / "s.safetensors")
    values = sorted(scores["magnitude"]["3"])
    about = found["signals"]["magnitude"][1]
    assert (about["group"], about["units"]) == ("3", 12)
    assert (about["least"], about["most"]) == (values[0], values[-1])
    assert about["median"] == pytest.approx((values[5] + values[6]) / 2)
    plan = ("plan", *BASE, "--scores", "s.safetensors", "--allocator", "uniform", "--removal", "magnitude")
    kept = {}
    for share in ("0.75", "0.4"):
        kept[share] = json.loads(done(*plan, "--macs", share, "--out", "p.json", "--json"))["predicted"][
            "macs"
        ]
    assert kept["0.4"] <= 0.4 * 38_916 < kept["0.75"] <= 0.75 * 38_916
    assert "expected scores of signal 'wasserstein'" in refused(
        2, "plan", *BASE, "--scores", "s.safetensors", "--out", "p.json"
    )


def test_scoring_and_planning_need_no_data_where_the_signal_needs_none(folder: Path) -> None:
    base = ("--model", "net.py:make", "--input", "2x3x6x6", "--allocator", "uniform", "--removal", "l2")
    done("score", *base, "--out", "s.safetensors")
    done("plan", *base, "--ratio", "0.25", "--scores", "s.safetensors", "--out", "plan.json")
    applied = ("apply", "--model", "net.py:make", "--plan", "plan.json", "--out", "s", "--json")
    assert "expected one of graph, leave" in refused(2, *applied, "--on-unrealisable", "whole")
    found = json.loads(done(*applied, "--on-unrealisable", "leave"))
    assert found["pruned"]["macs"] < found["dense"]["macs"]
    assert found["proof"]["difference"] <= 1e-9


def test_a_checkpoint_and_a_memory_bound_change_no_score(folder: Path) -> None:
    done("score", *BASE, "--out", "plain.safetensors")
    done("score", *BASE, "--checkpoint", "c", "--memory", "1 MB", "--out", "bounded.safetensors")
    plain, bounded = (sc.Scores.load(folder / f"{name}.safetensors") for name in ("plain", "bounded"))
    assert plain.signals == bounded.signals == ("wasserstein", "taylor")
    assert all((plain[s][g] == bounded[s][g]).all() for s in plain.signals for g in plain[s])
    assert "memory" in refused(2, "score", *BASE, "--memory", "10", "--out", "s.safetensors")


def test_what_is_missing_is_named(folder: Path) -> None:
    assert "secateur score: expected --out, or scores in a configuration" in refused(2, "score", *BASE)
    assert "secateur plan: expected --scores, or scores" in refused(2, "plan", *BASE, "--out", "p.json")
    assert "secateur apply: expected --plan, or plan" in refused(2, "apply", *BASE, "--out", "small")
    line = refused(2, "repair", *BASE, "--out", "fixed")
    assert "secateur repair: expected --artefact, or artefact" in line
    line = refused(2, "repair", *BASE, "--artefact", "none", "--out", "fixed")
    assert "expected a folder with model.safetensors" in line
    line = refused(2, "repair", *BASE, "--artefact", "none", "--out", "fixed", "--repair", "none")
    assert "expected a repair, got none" in line
    line = refused(2, "score", *BASE, "--granularity", "weight", "--memory", "1 GB", "--out", "s")
    assert "score(memory='1 GB'): expected no such setting with granularity 'weight'" in line
    assert not {"small", "fixed", "p.json"} & {path.name for path in folder.iterdir()}


def test_a_plan_for_another_model_is_refused(folder: Path) -> None:
    done("score", *BASE, "--out", "s.safetensors")
    done("plan", *BASE, "--macs", "0.5", "--scores", "s.safetensors", "--out", "plan.json")
    net = (folder / "net.py").read_text()
    (folder / "other.py").write_text(net.replace("(12, 3)", "(12, 5)"))
    line = refused(2, "apply", "--model", "other.py:make", "--plan", "plan.json", "--out", "small")
    assert "expected the model it was made for" in line
    assert not (folder / "small").exists()
