"""Who is dropped when, and who wins."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from secateur.pipeline.auto.rounds import Stage, run_rounds
from secateur.repairs.judging import standard_errors

NOISE = np.random.default_rng(0).normal(size=100)
HEATS = (Stage(3, None), Stage(2, 3.0), Stage(1, None))


def runs(levels: dict[str, list[float]]) -> tuple[list[tuple[str, int]], object]:
    seen: list[tuple[str, int]] = []

    def run(name: str, number: int) -> NDArray[np.float64]:
        seen.append((name, number))
        return levels[name][number] + 0.1 * np.roll(NOISE, len(name))

    return seen, run


def test_the_best_of_the_last_round_wins_though_it_was_not_the_first_to_lead() -> None:
    seen, run = runs({"a": [1, 1.0, 1.0], "bb": [2, 1.01, 0.5], "ccc": [3, 3, 0], "dddd": [4, 0, 0]})
    found = run_rounds(["a", "bb", "ccc", "dddd"], run, HEATS)  # type: ignore[arg-type]
    assert [r.name for r in found] == ["bb", "a", "ccc", "dddd"]
    assert [len(r.errors) for r in found] == [3, 3, 2, 1]
    assert found[0].out == ""
    assert found[1].out.startswith("round 3: place 2")
    assert "round 2" in found[2].out
    assert found[3].out.startswith("round 1: place 4")
    assert ("dddd", 1) not in seen
    assert ("ccc", 2) not in seen


def test_the_race_ends_when_the_others_are_clearly_worse() -> None:
    seen, run = runs({"a": [1, 1, 1], "bb": [1, 2, 0]})
    found = run_rounds(["a", "bb"], run, HEATS)  # type: ignore[arg-type]
    assert found[0].name == "a"
    assert len(seen) == 4
    assert "standard errors behind" in found[1].out


def test_without_a_margin_place_alone_decides() -> None:
    _, run = runs({"a": [1, 1, 1], "bb": [100, 1, 0.2]})
    found = run_rounds(["a", "bb"], run, HEATS)  # type: ignore[arg-type]
    assert found[0].name == "bb"


def test_who_cannot_run_or_is_not_finite_is_out() -> None:
    def run(name: str, number: int) -> NDArray[np.float64] | str:
        return {"x": "did not run: no", "nan": np.full(9, np.nan), "ok": np.ones(9)}[name]

    found = run_rounds(["x", "nan", "ok"], run, HEATS)
    assert [r.name for r in found] == ["ok", "nan", "x"]
    assert found[2].out == "did not run: no"
    assert "far behind" in found[1].out
    assert all(r.out for r in run_rounds(["x"], run, HEATS))


def test_one_that_always_goes_on_is_dropped_by_the_last_round_alone() -> None:
    seen, run = runs({"a": [1, 1, 1], "bb": [2, 2, 2], "ccc": [3, 3, 0]})
    found = run_rounds(["a", "bb", "ccc"], run, (Stage(1, None), Stage(1, 3.0), Stage(1, None)), {"ccc"})  # type: ignore[arg-type]
    assert [r.name for r in found] == ["ccc", "a", "bb"]
    assert [len(r.errors) for r in found] == [3, 3, 1]
    assert ("bb", 1) not in seen
    _, run = runs({"a": [1, 1, 1], "ccc": [3, 3, 3]})
    assert run_rounds(["a", "ccc"], run, HEATS, {"ccc"})[1].out.startswith("round 3: place 2")  # type: ignore[arg-type]


def test_equals_keep_their_order() -> None:
    found = run_rounds(["b", "a"], lambda name, number: np.ones(5), HEATS)
    assert [r.name for r in found] == ["b", "a"]


def test_standard_errors_are_those_of_the_paired_t_statistic() -> None:
    from scipy.stats import ttest_1samp

    values = NOISE + 0.3
    assert standard_errors(values) == pytest.approx(ttest_1samp(values, 0).statistic)
    assert standard_errors(np.zeros(5)) == 0
    assert standard_errors(np.ones(5)) == np.inf
    assert standard_errors(np.array([3.0])) == 0
    assert standard_errors(np.array([1.0, np.nan])) == np.inf
