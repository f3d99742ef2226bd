"""`secateur prune --granularity expert`, and its plan for a checkpoint on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import secateur as sc
from secateur.artefact.save import saved_record
from tests.cli.conftest import refused, run
from tests.targets.experts.models import library

MIXTURE = """
import torch
from tests.targets.experts import models


def make():
    return models.make("mixtral")


def plain():
    return models.make("plain")


def load():
    return [{"input_ids": part, "labels": part} for part in models.words(20, 16).chunk(5)]


def pairs():
    return [(part, part[:, 0]) for part in models.words(20, 16).chunk(5)]
"""
BASE = ("prune", "--granularity", "expert", "--out", "small")
MODEL = ("--model", "mixture.py:make", "--data", "mixture.py:load")


@pytest.fixture(autouse=True)
def mixture(folder: Path) -> None:
    library()
    (folder / "mixture.py").write_text(MIXTURE)


def test_step_by_step_equals_prune(folder: Path) -> None:
    def done(*arguments: str) -> str:
        result = run(*arguments)
        assert result.exit_code == 0, result.stderr
        return result.stdout

    asked = ("--granularity", "expert", "--allocator", "uniform")
    done("prune", *MODEL, *asked, "--experts", "0.75", "--out", "whole")
    done("score", *MODEL, *asked, "--ratio", "0.25", "--out", "s.safetensors")
    done("plan", *MODEL, *asked, "--experts", "0.75", "--scores", "s.safetensors", "--out", "plan.json")
    done("apply", *MODEL, "--plan", "plan.json", "--out", "small")
    done("repair", *MODEL, "--artefact", "small", "--out", "fixed")
    whole, fixed = (json.loads((folder / out / "secateur.json").read_text()) for out in ("whole", "fixed"))
    assert whole["plan"] == fixed["plan"] == json.loads((folder / "plan.json").read_text())
    assert whole == fixed  # the tensors' checksum among it
    said = refused(2, "repair", *MODEL, "--artefact", "small", "--repair", "variance", "--out", "none")
    assert "expected None, 'auto', 'experts', 'merge' or" in said
    table = done("tolerance", *MODEL, "--granularity", "expert", "--rows", "4")
    assert "removal reap, protection expert_taylor" in table
    compared = ("compare", *MODEL, "--granularity", "expert", "--rules", "uniform", "--json")
    found = json.loads(done(*compared, "--experts", "0.5,0.75", "--repair", "none"))
    assert [o["budget"] for o in found["outcomes"]] == [{"experts": 0.75}, {"experts": 0.5}]


def test_from_a_model_to_a_smaller_checkpoint(folder: Path) -> None:
    from tests.targets.experts.models import make, words

    done = run(*BASE, *MODEL, "--experts", "0.75", "--allocator", "uniform", "--repair", "none")
    assert done.exit_code == 0, done.stderr
    assert "written to  small" in done.stdout
    plan = saved_record(folder / "small").plan
    assert [g.kept for g in plan.groups] == [6, 6]
    small = sc.load(folder / "small", lambda: make("mixtral"))
    make("mixtral").save_pretrained(folder / "dense")  # type: ignore[operator]
    done = run("prune-checkpoint", "dense", "--plan", "small", "--out", "smaller")
    assert done.exit_code == 0, done.stderr
    assert "12 of 16 experts kept in 2 blocks" in done.stdout
    stock = library().AutoModelForCausalLM.from_pretrained(folder / "smaller").eval()
    with torch.no_grad():
        assert torch.equal(stock(words()).logits, small(words()).logits)


@pytest.mark.parametrize(
    ("options", "rule", "kept"),
    [
        (("--experts", "10"), "tod", 10),
        (("--experts", "0.5", "--allocator", "global"), "global", 8),
        (("--ratio", "0.25", "--allocator", "uniform"), "uniform", 12),
        (("--experts", "12", "--allocator", "random"), "uniform", 12),
    ],
)
def test_rules_and_budgets(folder: Path, options: tuple[str, ...], rule: str, kept: int) -> None:
    done = run(*BASE, *MODEL, *options, "--json")
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["asked"]["granularity"] == "expert"
    plan = saved_record(folder / "small").plan
    assert plan.allocator == rule
    assert sum(g.kept for g in plan.groups) == kept


def test_a_model_without_experts_is_refused_by_name(folder: Path) -> None:
    said = refused(2, *BASE, "--model", "net.py:make", "--data", "net.py:load", "--experts", "0.5")
    assert "expected Sequential to hold a mixture of experts, got none" in said


def test_what_cannot_be_is_refused_by_name(folder: Path) -> None:
    said = refused(3, *BASE, *MODEL, "--experts", "3")
    assert "got 4" in said
    said = refused(2, *BASE, *MODEL, "--experts", "0.5", "--allocator", "lamp")
    assert "expected one of tod, emp, global, uniform, random or an Allocator, got 'lamp'" in said
    said = refused(2, *BASE, *MODEL, "--experts", "half")
    assert "--experts half: expected a fraction or a count" in said
    said = refused(2, "prune-checkpoint", "nowhere", "--plan", "none.json", "--out", "smaller")
    assert "plan 'none.json': expected JSON text or a readable file" in said
    said = refused(2, "prune-checkpoint", "nowhere", "--plan", ".", "--out", "smaller")
    assert "secateur.json" in said
