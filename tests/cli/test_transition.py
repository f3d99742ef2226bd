from __future__ import annotations

import json
from pathlib import Path

import pytest

from secateur.cli.curves import transition_table
from secateur.measure.evaluate import Evaluation
from secateur.targets.weights.transition import REPAIRS, Point, Transition
from tests.cli.conftest import refused, run

BASE = ("transition", "--model", "net.py:make", "--data", "x.npz")


def test_each_point_is_measured(folder: Path) -> None:
    args = (*BASE, "--rules", "uniform, repairability", "--sparsities", "0.9,0.5", "--json")
    result = run(*args)
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert [(p["rule"], p["sparsity"]) for p in found["points"]] == [
        ("uniform", 0.5),
        ("uniform", 0.9),
        ("repairability", 0.5),
        ("repairability", 0.9),
    ]
    assert all(0 <= p["accuracy"] <= 1 and p["loss"] > 0 for p in found["points"])
    assert set(found["last"]) == {"uniform", "repairability"}
    assert run(*args).stdout == result.stdout


@pytest.mark.parametrize("repair", REPAIRS)
def test_the_table_and_the_plot(folder: Path, repair: str) -> None:
    pytest.importorskip("matplotlib")
    result = run(*BASE, "--rules", "erk,lamp", "--sparsities", "0.6", "--repair", repair, "--plot", "t.svg")
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith(f"Sequential, magnitude, repaired by {repair}; dense: top-1 ")
    assert lines[2].split() == ["sparsity", "erk", "lamp"]
    assert lines[3].split()[:2] == ["60.0", "%"]
    assert lines[-1] == "written to  t.svg"
    assert b"of weights removed" in (folder / "t.svg").read_bytes()


def test_where_a_rule_stops() -> None:
    points = [Point("a", 0.5, 1.0, 0.80), Point("a", 0.7, 1.1, 0.77), Point("a", 0.9, 3.0, 0.3)]
    points += [Point("b", 0.7, 2.0, 0.5), Point("b", 0.5, 2.0, 0.5), Point("b", 0.9, 1.0, 0.8)]
    found = Transition(Evaluation(1.0, 0.8, 100), tuple(points), 0.95)
    assert found.last("a") == 0.7
    assert found.last("b") is None  # the first is lost already
    lines = transition_table("Net", ("a", "b"), found).splitlines()
    assert [line.split() for line in lines[3:6]] == [
        ["50.0", "%", "80.0", "%", "50.0", "%"],
        ["70.0", "%", "77.0", "%", "50.0", "%"],
        ["90.0", "%", "30.0", "%", "80.0", "%"],
    ]
    assert lines[7].split() == ["up", "to", "70.0", "%", "none"]
    # By loss, where there is no accuracy.
    points = [Point("a", 0.5, 1.04, None), Point("a", 0.7, 1.06, None)]
    assert Transition(Evaluation(1.0, None, 100), tuple(points), 0.95).last("a") == 0.5


def test_bad_input(folder: Path) -> None:
    assert "--rules tod: expected one of emp, uniform, " in refused(2, *BASE, "--rules", "tod")
    assert "--sparsities 1: expected a number above 0 and below 1" in refused(
        2, *BASE, "--sparsities", "0.5,1"
    )
    assert "--sparsities half: expected a number" in refused(2, *BASE, "--sparsities", "half")
    assert "--criterion l3: expected one of magnitude" in refused(2, *BASE, "--criterion", "l3")
    assert "--repair auto: expected one of variance, channelwise, " in refused(2, *BASE, "--repair", "auto")
    assert "--share 0: expected a number above 0 and of at most 1" in refused(2, *BASE, "--share", "0")
