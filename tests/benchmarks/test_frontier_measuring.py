"""The frontier's counter, bisection and result file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import secateur as sc
from benchmarks.frontier.bisection import UnreachedError, nearest_below
from benchmarks.frontier.run import within
from benchmarks.frontier.store import Store
from benchmarks.frontier.workload import macs, params
from benchmarks.small_networks import RECIPES


@pytest.mark.parametrize("name", ["resnet18", pytest.param("deit", marks=pytest.mark.slow)])
def test_the_counter_agrees_with_the_trace(name: str) -> None:
    model, images = RECIPES[name].make().eval(), torch.zeros(2, 3, 32, 32)
    cost = sc.trace(model, images).cost()
    assert (macs(model, images), params(model)) == (cost.macs, cost.params)


def test_bisection_finds_the_dearest_within_the_target() -> None:
    def steps(ratio: float) -> float:
        return 1 - int(ratio * 10) / 10

    found = nearest_below(steps, lambda value: value, 0.55)
    assert found.value == found.cost == pytest.approx(0.5)
    assert 0.5 <= found.setting < 0.6


def test_bisection_says_what_it_reached() -> None:
    with pytest.raises(UnreachedError, match=r"at most 0\.200 of the MACs, got no less than 0\.700"):
        nearest_below(lambda ratio: max(0.7, 1 - ratio), lambda value: value, 0.2)


def test_results_are_taken_up_again(tmp_path: Path) -> None:
    about = {"calibration_images": 100}
    first = Store("tiny", about, tmp_path)
    first.add("runs", {"seed": 0, "rule": "tod", "point": 0.5, "top1": 0.8})
    first.add("runs", {"seed": 1, "rule": "tod", "point": 0.5, "error": "no"})
    again = Store("tiny", about, tmp_path)
    assert again.has("runs", seed=0, rule="tod", point=0.5)
    assert not again.has("runs", seed=0, rule="tod", point=0.7)
    again.add("runs", {"seed": 2, "rule": "tod", "point": 0.5, "top1": 0.7})
    assert [run["session"] for run in again.content["runs"]] == [0, 0, 1]
    again.forget_failures()
    assert [run["seed"] for run in again.content["runs"]] == [0, 2]


def test_results_of_another_workload_are_not_mixed(tmp_path: Path) -> None:
    Store("tiny", {"calibration_images": 100}, tmp_path).write()
    with pytest.raises(SystemExit, match="the same calibration_images"):
        Store("tiny", {"calibration_images": 200}, tmp_path)


def test_what_takes_too_long_is_interrupted() -> None:
    def forever() -> None:
        with within(0.05):
            while True:
                pass

    with pytest.raises(TimeoutError, match=r"more than 0\.05 s"):
        forever()
