"""What `bench_zoo` says of an architecture that was pruned better before."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bench_zoo, results
from tests.zoo.walk import Walked

GOOD = Walked("cross_attention", "plain", macs_share=0.8, form="module")


def test_a_form_and_a_coverage_that_got_worse_are_named() -> None:
    rows = {GOOD.name: asdict(GOOD)}
    assert bench_zoo.worse([GOOD, replace(GOOD, name="new", form="graph")], rows) == {}
    now = replace(GOOD, form="graph", note="why")
    assert bench_zoo.worse([now], rows) == {GOOD.name: "form module before, graph now (why)"}
    assert bench_zoo.worse([GOOD], {GOOD.name: asdict(now)}) == {}
    less = bench_zoo.worse([replace(GOOD, macs_share=0.5)], rows)
    assert less == {GOOD.name: "coverage 0.800 before, 0.500 now"}


@pytest.mark.parametrize("named", [True, False])
def test_what_got_worse_fails_until_it_is_mended(
    named: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    answers: list[Any] = []

    def walk(entry: Any, *, program: bool) -> Walked:
        if isinstance(answers[0], Exception):
            raise answers[0]
        return replace(answers[0], seconds=dict.fromkeys(("trace", "apply", "verify"), 0.0))

    monkeypatch.setattr(results, "FOLDER", tmp_path)
    monkeypatch.setattr(bench_zoo, "walk", walk)
    monkeypatch.setattr(bench_zoo, "ZOO", [e for e in bench_zoo.ZOO if e.name == GOOD.name])
    monkeypatch.setattr(sys, "argv", ["bench_zoo", *([GOOD.name] if named else [])])
    bad = replace(GOOD, form="graph")
    for answer, status in ((GOOD, 0), (bad, 1), (bad, 1), (ValueError("refused"), 1), (bad, 1), (GOOD, 0)):
        answers[:] = [answer]
        assert bench_zoo.main() == status
        written = json.loads((tmp_path / "zoo.json").read_text())
        assert [row["form"] for row in written["architectures"]] == ["module"]
        assert bool(written["failed"]) == bool(status)
        assert written["realised_as_module"] == 1 - status
