"""Pruning by weights alone, from the command line, and hints that fit the cause."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import secateur as sc
from secateur.cli.loading.models import library_errors
from secateur.errors import SettingError
from tests.cli.conftest import refused, run

ASKED = ("prune", "--model", "net.py:make", "--input", "1x3x6x6", "--out", "small")


@pytest.mark.parametrize(
    "how",
    [
        ("--allocator", "uniform", "--macs", "0.5"),
        ("--allocator", "global", "--macs", "0.5", "--removal", "l1"),
        ("--granularity", "weight", "--allocator", "uniform", "--sparsity", "0.5"),
    ],
)
def test_a_rule_that_reads_weights_alone_needs_no_data(folder: Path, how: tuple[str, ...]) -> None:
    done = run(*ASKED, *how)
    assert done.exit_code == 0, done.stderr
    report = sc.Report.from_json(folder / "small" / "report.json")
    assert report.judged_on == "random inputs of the given sizes"
    assert report.calibration == {}
    assert report.repairs == ()
    assert {f.measure for f in report.figures} == {"distance to dense"}
    assert "random inputs of the given sizes" in " ".join(done.stdout.split())
    made: dict[str, Any] = {}
    exec((folder / "net.py").read_text(), made)
    small = sc.load(folder / "small", made["make"])
    assert small(torch.randn(2, 3, 6, 6)).shape == (2, 3)
    if "weight" not in how:
        assert report.figures[1].macs <= report.figures[0].macs / 2


def test_data_to_measure_on_may_be_given(folder: Path) -> None:
    done = run(*ASKED, "--allocator", "uniform", "--macs", "0.5", "--evaluation", "x.npz", "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["judged_on"] == "evaluation data"
    assert found["figures"][0]["accuracy"] is not None


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ((), "expected --data for allocator auto, which tries rules on data"),
        (("--allocator", "tod"), "expected --data for allocator tod, which needs some (signal wasserstein"),
        (("--allocator", "repair_aware"), "expected --data for allocator repair_aware"),
        (("--allocator", "uniform", "--removal", "taylor", "--macs", "0.5"), "signal taylor"),
        (("--allocator", "uniform", "--repair", "bias"), "--repair: expected it together with --data"),
        (("--allocator", "uniform", "--max-drop", "1%"), "--max-drop: expected it together with --data"),
        (("--allocator", "uniform", "--quantise", "int8"), "--quantise: expected it together with --data"),
    ],
)
def test_what_needs_data_says_so(folder: Path, how: tuple[str, ...], said: str) -> None:
    assert said in refused(2, *ASKED, *how)
    assert not (folder / "small").exists()


def test_neither_data_nor_input(folder: Path) -> None:
    said = refused(2, "prune", "--model", "net.py:make", "--out", "small", "--allocator", "uniform")
    assert "expected --data, or --input for a rule that needs none, got neither" in said


def test_hints_fit_the_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    def said(error: Exception, library: str = "timm") -> str:
        with (
            pytest.raises(SettingError) as caught,
            library_errors("here", "it", "Check the name.", library=library),
        ):
            raise error
        return str(caught.value)

    assert said(ModuleNotFoundError("No module named 'timm'", name="timm")).endswith("Run pip install timm.")
    assert said(ModuleNotFoundError("...", name="yaml.nodes")).endswith("Run pip install yaml.")
    broken = said(RuntimeError("operator torchvision::nms does not exist"))
    assert f"does not load beside torch {torch.__version__}" in broken
    assert "pip install timm" not in broken
    assert said(ImportError("cannot import name 'x' from 'y'")).endswith("install another version of it.")
    assert said(RuntimeError("Unknown model (resnet1)")).endswith("Check the name.")
    monkeypatch.setitem(sys.modules, "timm", None)
    assert "timm" in refused(2, "inspect", "--model", "timm:resnet18", "--input", "1x3x32x32")
