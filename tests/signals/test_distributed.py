from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from secateur.plan import Plan
from secateur.signals import Scores, score
from tests.signals.processes import in_processes
from tests.signals.shared import ALL, LIGHT, TWO, abandoned, cases, plain, pruned, refitted

Met = list[dict[str, Any]]
"""What each process met, by case."""


@pytest.mark.parametrize("size", [2, 3])
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
    assert left.startswith("ScoreError: process 0 of 2: expected the others to answer, got ")


def scores_are_those_of_a_single_process(met: Met) -> None:
    graph, data = plain()
    assert_equal(met, "all", score(graph, data, ALL))
    assert_equal(met, "one batch", score(graph, data[:1], ALL))
    assert_equal(met, "memory", score(graph, data, LIGHT))
    assert_equal(met, "weights", score(graph, None, "magnitude"))


def all_prune_by_one_plan(met: Met) -> None:
    (shared,) = {mine["plan"] for mine in met}
    alone = Plan.from_json(pruned())
    removed = [group.removed for group in alone.groups]
    assert [group.removed for group in Plan.from_json(shared).groups] == removed
    assert any(removed)


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
    graph, data = plain()
    for mine in met:
        assert "disk on fire" in mine["killed"]
        assert mine["files"] == [f"run.{rank}of{len(met)}" for rank in range(len(met))]
        assert mine["files after"] == []
    assert_equal(met, "resumed", score(graph, data, TWO))


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
