from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from secateur.errors import SettingError
from secateur.plan import Plan
from secateur.signals import Scores, score
from secateur.signals.liveness import VARIABLE, patience
from tests.signals.processes import in_processes
from tests.signals.shared import ALL, LIGHT, TWO, abandoned, cases, failing, plain, pruned, refitted

Met = list[dict[str, Any]]
"""What each process met, by case."""


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_processes_that_share_the_work(size: int, tmp_path: Path) -> None:
    """One test, for the time the processes take to start. Three have their group before `score` is called."""
    met = in_processes(cases, size, tmp_path, size == 3)
    scores_are_those_of_a_single_process(met)
    all_prune_by_one_plan(met)
    all_refit_to_the_same_weights(met)
    an_error_in_one_process_is_raised_in_all(met)
    processes_that_are_not_about_the_same_are_refused(met)
    a_shared_run_resumes(met)
    left, killed = in_processes(abandoned, 2)
    assert killed is None
    assert left.startswith("OtherProcessError: process 0 of 2: expected process 1 to go on, but it has ended")


@functools.cache
def alone() -> dict[str, Scores]:
    """By case: what this process alone finds."""
    graph, data = plain()
    return {
        "all": score(graph, data, ALL),
        "one batch": score(graph, data[:1], ALL),
        "memory": score(graph, data, LIGHT),
        "weights": score(graph, None, "magnitude"),
        "resumed": score(graph, data, TWO),
    }


def scores_are_those_of_a_single_process(met: Met) -> None:
    for what, scores in alone().items():
        assert_equal(met, what, scores)


def all_prune_by_one_plan(met: Met) -> None:
    assert {mine["plan"] for mine in met} == {pruned()}  # byte for byte, certificates included
    assert any(group.removed for group in Plan.from_json(met[0]["plan"]).groups)


def all_refit_to_the_same_weights(met: Met) -> None:
    alone = refitted()
    assert all(mine["refitted"] == met[0]["refitted"] for mine in met)
    for ours, theirs in zip(met[0]["refitted"], alone, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def an_error_in_one_process_is_raised_in_all(met: Met) -> None:
    for what, where, own, others in (
        ("bad batch", 1, "CalibrationError: calibration batch 1: expected", "CalibrationError: process 1 of"),
        (
            "bad loader",
            1,
            "OSError: disk on fire",
            "OtherProcessError: process 1 of .*, got OSError: disk on fire",
        ),
        (
            "bad setting",
            1,
            "SettingError: checkpoint: expected a",
            "ScoreError: process 1 of .*, got Setting",
        ),
        ("one class", 0, "CalibrationError: wasserstein: expected samples", "CalibrationError: process 0 of"),
    ):
        for rank, mine in enumerate(met):
            assert re.match(own if rank == where else others, mine[what]), mine[what]

    for rank, mine in enumerate(met):
        for what in mine["bad refit"]:  # in whichever pass over the data it fails
            assert "OSError: disk on fire" in what, what
            assert what.startswith("OSError" if rank == 1 else "OtherProcessError: process 1 of"), what


def processes_that_are_not_about_the_same_are_refused(met: Met) -> None:
    for rank, mine in enumerate(met):
        other = 0 if rank else 1
        expected = f"score, processes {rank} and {other}: expected the same seed {rank}, got {other}."
        assert expected in mine["seeds"]
        assert "expected the same data in every process, got a loader" in mine["shared twice"]


def a_shared_run_resumes(met: Met) -> None:
    for mine in met:
        assert "disk on fire" in mine["killed"]
        assert mine["files"] == [f"run.{rank}of{len(met)}" for rank in range(len(met))]
        assert mine["files after"] == []


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(
    ("what", "own", "others"),
    [
        ("absent", "nothing", "expected all {size} processes within 3 s, but process 1 has not come"),
        (
            "stuck",
            None,
            r"expected a sign of life from process 1 within 3 s, got none: .*last seen at shared",
        ),
        ("stopped", None, "expected a sign of life from process 1 within 3 s, got none"),
        ("killed", None, "expected process 1 to go on, but it has ended without a word"),
        ("raises", "OSError: disk on fire", "process 1 of {size}: .* got OSError: disk on fire"),
        ("interrupted", "KeyboardInterrupt", "process 1 of {size}: .*but it left: KeyboardInterrupt"),
        ("other weights", "expected the same weights .*, got", "expected the same weights .*, got"),
        ("other data", "expected the same values in the first batch", "the same values in the first batch"),
        (
            "other layout",
            r"expected the same first batch float64 \[4, 3, 8, 8\]",
            "expected the same first batch",
        ),
        ("other data later", "expected the same data", "expected the same data"),
        ("more data", "expected the same number of batches", "expected the same number of batches"),
        ("one value is NaN", "expected the same data", "expected the same data"),
        ("other setting", "expected the same signals", "expected the same signals"),
    ],
)
def test_a_process_that_fails(
    what: str, own: str | None, others: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All others get an error that names it, in a few seconds."""
    if size == 3 and what not in ("absent", "stuck", "raises", "other data later"):
        pytest.skip("as with two processes")
    monkeypatch.setenv(VARIABLE, "3")
    for rank, met in enumerate(in_processes(failing, size, what, allow=own is None)):
        if rank == 1 and own is None:
            assert met is None
        else:
            assert re.search((own or "") if rank == 1 else others.format(size=size), met), met


@pytest.mark.slow
@pytest.mark.parametrize("call", ["prune", "repair"])
@pytest.mark.parametrize("what", ["stuck", "other weights", "other data", "absent"])
def test_a_process_that_fails_in_other_calls(call: str, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "3")
    met = in_processes(failing, 2, what, call, allow=what == "stuck")
    expected = {
        "stuck": "sign of life from process 1",
        "other weights": f"{call}, processes 0 and 1: expected the same weights",
        "other data": f"{call}, processes 0 and 1: expected the same values in the first batch",
        "absent": "process 1 has not come",
    }
    assert re.search(expected[what], met[0]), met[0]


def test_how_long_processes_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert patience() == 50
    for text in ("0", "-1", "soon", "nan", "1e9"):
        monkeypatch.setenv(VARIABLE, text)
        with pytest.raises(SettingError, match=f"{VARIABLE}: expected seconds above 0, got"):
            patience()


def test_the_store_that_torch_keeps_is_still_found() -> None:
    """It is not public; without it, nobody is missed before the default time of a collective operation."""
    assert callable(dist.distributed_c10d._get_default_store)


def assert_equal(met: Met, what: str, expected: Scores) -> None:
    """Every process has the same scores, bit for bit, and they are the expected ones to rounding.

    Sums are added in another order, and the elimination behind `reconstruction` magnifies what that changes.
    """
    first = Scores.load(met[0][what])
    for mine in met:
        got = Scores.load(mine[what])
        assert got.signals == expected.signals
        for fact in ("samples", "classes", "fingerprint"):
            assert getattr(got, fact) == getattr(expected, fact)
        for name in expected.signals:
            assert list(got[name]) == list(expected[name])
            for group, vector in expected[name].items():
                assert got[name][group].tobytes() == first[name][group].tobytes()
                np.testing.assert_allclose(got[name][group], vector, rtol=1e-11, err_msg=f"{name} {group}")


def test_the_comparison_sees_a_difference(tmp_path: Path) -> None:
    one, other, third = (Scores({"a": {"g": np.array([1.0, 1.0 + x])}}) for x in (0, 4e-11, 1e-15))
    named = enumerate((one, other, third))
    files = {scores: {"": scores.save(tmp_path / str(index))} for index, scores in named}
    assert_equal([files[one]], "", third)
    for met in ([files[other]], [files[one], files[third]]):
        with pytest.raises(AssertionError):
            assert_equal(met, "", one)


def test_without_torchrun_nothing_is_initialised() -> None:
    graph, data = plain()
    score(graph, data, "taylor")
    assert not dist.is_initialized()


_PROGRAM = """
import sys
from tests.signals.shared import plain
from secateur.signals import score
import torch.distributed as dist

graph, data = plain()
scores = score(graph, data)
scores.save(f"{sys.argv[1]}/{dist.get_rank()}")
score(graph, data, "taylor")
"""


@pytest.mark.slow
def test_under_torchrun(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(_PROGRAM)
    root = Path(__file__).parents[2]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"PYTHONPATH": f"{root / 'src'}{os.pathsep}{root}", "OMP_NUM_THREADS": "1"}
    subprocess.run([*torchrun, program, tmp_path], env=environment, check=True)
    graph, data = plain()
    for rank in range(2):
        assert_equal([{"": tmp_path / str(rank)}], "", score(graph, data))
