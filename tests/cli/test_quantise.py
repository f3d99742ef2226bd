from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import refused, run

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

ASKED = ("--model", "net.py:make", "--data", "x.npz")


def test_prune_and_then_quantise_by_one_command_or_by_two(folder: Path) -> None:
    done = run(
        "prune", *ASKED, "--macs", "0.6", "--allocator", "uniform", "--quantise", "int8", "--out", "small"
    )
    assert done.exit_code == 0, done.stderr
    assert "then quantised" in done.stdout
    assert "pruned + int8" in done.stdout
    written = (folder / "small" / "int8.onnx").stat().st_size
    found = json.loads((folder / "small" / "report.json").read_text())["quantised"]
    assert found["stages"][-1]["file_bytes"] == written
    done = run("quantise", "small", *ASKED, "--out", "other.onnx", "--json")
    assert done.exit_code == 0, done.stderr
    again = json.loads(done.stdout)
    assert [stage["stage"] for stage in again["stages"]] == ["dense", "pruned", "pruned + int8"]
    assert (folder / "other.onnx").stat().st_size == again["stages"][-1]["file_bytes"]
    assert "written to  other.onnx" in run("quantise", "small", *ASKED, "--out", "other.onnx").stdout
    assert "ends in .onnx" in refused(2, "quantise", "small", *ASKED, "--out", "a.pt2")
    assert "one of int8, int4" in refused(2, "quantise", "small", *ASKED, "--out", "a.onnx", "--kind", "int2")
    assert "int8, int4" in refused(2, "prune", *ASKED, "--quantise", "int2", "--out", "b")
