from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.cli.conftest import refused, run

MODEL = ("--model", "net.py:make")


@pytest.fixture
def small(folder: Path) -> Path:
    """A folder that prune wrote, beside the user's files."""
    done = run("prune", *MODEL, "--data", "x.npz", "--macs", "0.6", "--repair", "none", "--out", "small")
    assert done.exit_code == 0, done.stderr
    return folder / "small"


def test_table_and_json(small: Path) -> None:
    done = run("bench", "small", *MODEL, "--batch", "1", "--batch", "4", "--rounds", "5", "--threads", "1")
    assert done.exit_code == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["back", "end", "batch", "dense", "pruned", "speed-up", "95%", "interval"]
    assert [line.split()[:2] for line in lines[1:3]] == [["eager", "1"], ["eager", "4"]]
    assert "with 1 thread." in " ".join(lines)
    done = run("bench", "small", *MODEL, "--input", "3x3x6x6", "--rounds", "6", "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    (row,) = found["rows"]
    assert (row["backend"], row["batch"], len(row["dense"]["seconds"])) == ("eager", 3, 6)
    assert row["verdict"] in ("faster", "slower", "no gain")
    assert bool(found["reasons"]) <= (row["verdict"] != "faster")


def test_bad_input_leaves_threads_alone(small: Path) -> None:
    before = torch.get_num_threads()
    base = ("bench", "small", *MODEL)
    assert "eager, compile, onnxruntime, got tensorrt" in refused(2, *base, "--backend", "tensorrt")
    assert "rounds=1" in refused(2, *base, "--rounds", "1", "--threads", "2")
    assert "--threads 0" in refused(2, *base, "--threads", "0")
    assert torch.get_num_threads() == before
