from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import refused, run

BASE = ("compare", "--model", "net.py:make", "--data", "x.npz", "--batch-size", "8")


def test_it_compares_what_prune_would_give(folder: Path) -> None:
    pytest.importorskip("matplotlib")
    asked = ("--rules", "uniform,global", "--macs", "0.4,0.75", "--removal", "l2", "--repair", "bias")
    result = run(*BASE, *asked, "--plot", "c.svg", "--json", "--seed", "3")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert [(o["rule"], o["budget"]) for o in found["outcomes"]] == [
        ("uniform", {"macs": 0.75}),
        ("global", {"macs": 0.75}),
        ("uniform", {"macs": 0.4}),
        ("global", {"macs": 0.4}),
    ]
    assert b"of dense MACs" in (folder / "c.svg").read_bytes()
    one = ("--allocator", "global", "--removal", "l2", "--macs", "0.4", "--repair", "bias", "--seed", "3")
    pruned = run("prune", *BASE[1:], *one, "--out", "small", "--json")
    assert pruned.exit_code == 0, pruned.stderr
    figures = json.loads(pruned.stdout)["figures"]
    outcome = found["outcomes"][-1]
    assert outcome["cost"]["macs"] == figures[1]["macs"]
    assert outcome["pruned"]["loss"] == figures[1]["loss"]
    assert outcome["repaired"]["loss"] == figures[-1]["loss"]


def test_the_table(folder: Path) -> None:
    result = run(*BASE, "--rules", "random", "--macs", "0.5", "--repair", "none")
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith("Sequential: 1,155 parameters, 38,916 MACs for one sample; dense: top-1 ")
    assert lines[3].split()[:3] == ["macs", "0.5", "random"]
    assert lines[3].endswith("nothing helped")


def test_bad_input(folder: Path) -> None:
    assert "--rules best: expected one of auto" in refused(2, *BASE, "--rules", "best")
    assert "--macs 1: expected a number above 0 and below 1" in refused(2, *BASE, "--macs", "1")
    assert "ends in .svg, .png, .pdf" in refused(2, *BASE, "--plot", "c.txt")
    said = refused(2, *BASE, "--set", "granularity=expert")
    assert "expected Sequential to hold a mixture of experts, got none" in said
    said = refused(2, *BASE, "--granularity", "weight", "--rules", "tod")
    assert "expected a rule that reads magnitude" in said
    said = refused(2, *BASE, "--granularity", "weight", "--allow-inexact")
    assert "expected no such setting with granularity 'weight'" in said
    said = refused(2, *BASE, "--granularity", "weight", "--rules", "erk", "--macs", "0.5")
    assert "macs" in said


def test_single_weights_at_their_own_budgets(folder: Path) -> None:
    asked = (*BASE, "--granularity", "weight", "--repair", "none", "--json")
    result = run(*asked, "--sparsities", "0.6,0.3", "--rules", "erk,uniform", "--removal", "wanda")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["granularity"] == "weight"
    assert [(o["rule"], o["budget"]) for o in found["outcomes"]] == [
        ("erk", {"sparsity": 0.3}),
        ("uniform", {"sparsity": 0.3}),
        ("erk", {"sparsity": 0.6}),
        ("uniform", {"sparsity": 0.6}),
    ]
    result = run(*asked)
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert {o["rule"] for o in found["outcomes"]} == {
        "repairability",
        "emp",
        "erk",
        "lamp",
        "uniform",
        "random",
    }
    assert {o["budget"]["sparsity"] for o in found["outcomes"]} == {0.5, 0.7, 0.9}
