from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from secateur.allocators import Curve
from secateur.cli.curves import tolerance_table
from tests.cli.conftest import refused, run

BASE = ("tolerance", "--model", "net.py:make", "--data", "x.npz")


def test_each_tolerance_is_what_prune_makes_of_it(folder: Path) -> None:
    result = run(*BASE, "--json", "--seed", "3")
    assert result.exit_code == 0, result.stderr
    curve = json.loads(result.stdout)
    assert curve["allocator"] == "tod"
    assert curve["title"] == "Sequential, removal wasserstein, protection taylor"
    assert curve["knob"][0] is None
    for point in (1, len(curve["knob"]) // 2):
        chosen = ("--seed", "3", "--tolerance", str(curve["knob"][point]))
        pruned = run("prune", *BASE[1:], *chosen, "--out", "small", "--json")
        assert pruned.exit_code == 0, pruned.stderr
        report = json.loads(pruned.stdout)
        assert report["figures"][1]["macs"] == curve["macs"][point]
        assert report["figures"][1]["params"] == curve["params"][point]
        assert [layer["kept"] for layer in report["layers"]] == curve["kept"][point]
        assert [layer["group"] for layer in report["layers"]] == [g["name"] for g in curve["groups"]]


def test_the_table(folder: Path) -> None:
    result = run(
        *BASE, "--rows", "6", "--round-to", "2", "--removal", "magnitude", "--protection", "magnitude"
    )
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith("Sequential, removal magnitude, protection magnitude: ")
    assert "made a model" not in result.stdout
    table = [line.split() for line in lines[4 : lines.index("", 4)]]
    assert 2 <= len(table) <= 6
    assert table[0] == ["none", "100.0", "%", "█" * 20, "100.0", "%", "100.0", "%", "100.0", "%"]
    macs = [float(row[1]) for row in table]
    assert macs == sorted(macs, reverse=True)
    assert len(set(macs)) == len(macs)


def test_the_rows_say_what_the_curve_holds() -> None:
    curve = Curve(
        "tod",
        ("stem", "head"),
        np.array([8, 4]),
        np.array([-np.inf, 1 / 3, 0.5]),
        np.array([100, 80, 30]),
        np.array([1000, 700, 250]),
        np.array([[8, 4], [6, 4], [4, 1]]),
    )
    rows = tolerance_table("Net", curve, 20).splitlines()[4:7]
    assert [row.split() for row in rows] == [
        ["none", "100.0", "%", "█" * 20, "100.0", "%", "100.0", "%", "100.0", "%"],
        # 0.3333 would be below a third, so the value is rounded up.
        ["0.3334", "70.0", "%", "█" * 14 + "░" * 6, "80.0", "%", "75.0", "%", "100.0", "%", "stem"],
        ["0.5000", "25.0", "%", "█" * 5 + "░" * 15, "30.0", "%", "25.0", "%", "50.0", "%", "head"],
    ]


@pytest.mark.parametrize("name", ["curve.svg", "curve.PNG", "curve.pdf"])
def test_a_plot(folder: Path, name: str) -> None:
    pytest.importorskip("matplotlib")
    result = run(*BASE, "--plot", name)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.rstrip().endswith(f"written to  {name}")
    first = (folder / name).read_bytes()
    assert first[:5] in (b"<?xml", b"\x89PNG\r", b"%PDF-")
    if name == "curve.svg":
        assert b"% of units kept" in first
        assert run(*BASE, "--plot", name).exit_code == 0
        assert (folder / name).read_bytes() == first


def test_bad_input(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "ends in .svg, .png, .pdf, got '.txt'" in refused(2, *BASE, "--plot", "curve.txt")
    assert "a folder that can be written to, got 'none'" in refused(2, *BASE, "--plot", "none/curve.svg")
    assert "--rows 1: expected a number of at least 2" in refused(2, *BASE, "--rows", "1")
    assert "nonsense" in refused(2, *BASE, "--removal", "nonsense")

    original = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError("No module named 'matplotlib'")
        return original(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    assert 'Run pip install "secateur[plot]".' in refused(2, *BASE, "--plot", "curve.svg")
