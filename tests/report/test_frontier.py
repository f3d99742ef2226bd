"""Cost against quality in the report: the same points, words and limits on every face."""

from __future__ import annotations

import math
from typing import Any

import pytest

import secateur as sc
from secateur.pipeline.bounds.frontier import Frontier, Point
from secateur.report import frontier
from secateur.report.html import render
from tests.report.test_every import FACES, pruned, shown


def point(share: float, damage: float, verdict: str = "", **more: Any) -> Point:
    values = {"share": share, "macs": share, "params": share, "value": 0.9 - damage, "damage": damage}
    return Point(
        **{**values, "low": damage - 0.01, "high": damage + 0.01, "most": damage + 0.008, **more},
        verdict=verdict,
    )


def found(*points: Point, **more: Any) -> Frontier:
    asked: dict[str, Any] = {
        "cost": "macs", "bound": "accuracy_drop", "measure": "accuracy", "dense": 0.9, "samples": 500,
        "confidence": 0.95, "limit": 0.02,
    }  # fmt: skip
    return Frontier(**{**asked, **more}, points=points)


LOOKED = found(point(0.9, 0.0, "within"), point(0.7, 0.004, "chosen"), point(0.5, 0.03, "not confirmed"))


def test_it_says_what_was_confirmed_on_how_many() -> None:
    first, second = frontier.sentences(LOOKED)
    assert first.startswith(
        "The drop is at most 2.00 points (95 %): measured 0.40, at most 1.20 points, on 500 held-out "
        "samples. 3 plans were looked at"
    )
    assert "accuracy, dense 90.00 %" in second
    assert frontier.rows(LOOKED)[1] == (
        "70.0 %", "70.0 %", "70.0 %", "89.60 %", "0.40", "\N{MINUS SIGN}0.60 to 1.40", "chosen",
    )  # fmt: skip


def test_without_a_bound_it_promises_nothing() -> None:
    (only,) = frontier.sentences(found(point(0.5, 0.1), limit=None))
    assert "at most" not in only
    assert "each by itself" in only


def test_rises_are_in_percent() -> None:
    rising = found(
        point(0.8, 0.05, "chosen", macs=None), bound="perplexity_rise", measure="perplexity", limit=0.1
    )
    assert frontier.rows(rising)[0][4:6] == ("5.0 %", "4.0 % to 6.0 %")
    assert "The rise of the perplexity is at most 10.0 % (95 %)" in frontier.sentences(rising)[0]
    assert (
        frontier.lines(rising)[-1]
        == "80.0 % of the parameters: perplexity 0.85, 5.0 % (4.0 % to 6.0 %); chosen"
    )
    assert frontier.title(rising) == "Cost against perplexity"


def test_the_plot_has_the_dense_model_at_the_right_and_less_damage_above() -> None:
    plot = frontier.plot(LOOKED)
    assert plot is not None
    first, second, third = plot.marks
    assert 100 > first.x > second.x > third.x >= 0
    assert first.y > second.y > third.y  # more damage is further up
    assert all(mark.top < mark.y < mark.bottom for mark in plot.marks)
    assert [mark.chosen for mark in plot.marks] == [False, True, False]
    assert plot.limit is not None
    assert second.top < third.y < plot.limit < second.y or third.y < plot.limit < second.y
    assert all(0 <= tick.at <= 100 for tick in (*plot.across, *plot.up))
    assert frontier.plot(found(point(0.5, 0.1))) is None
    assert frontier.plot(found(point(0.5, 0.1), point(0.4, math.inf))) is None
    assert frontier.plot(None) is None


@pytest.mark.parametrize("granularity", ["unit", "weight"])
def test_every_face_shows_a_run_with_a_bound_on_quality(granularity: str) -> None:
    rule = "repair_aware" if granularity == "unit" else "emp"
    report = pruned(granularity, sc.Budget(accuracy_drop=0.7), allocator=rule, repair=None)
    assert report.frontier is not None
    chosen = next(row for row in frontier.rows(report.frontier) if row[-1] == "chosen")
    for face, write in FACES.items():
        text = write(report)
        for said in (
            *frontier.sentences(report.frontier),
            chosen[3],
            "at most 70 points drop of the accuracy",
        ):
            assert shown(face, said) in text, (face, said)
    assert ('class="dot' in render(report)) == (len(report.frontier.points) > 1)


def test_every_face_shows_what_met_bounds_on_memory() -> None:
    report = pruned("unit", sc.Budget(memory="4 kB", batch=1), allocator="uniform", repair=None)
    for face, write in FACES.items():
        text = write(report)
        assert shown(face, "at most 4 kB memory") in text, face
        assert shown(face, "batch") in text
    assert " MB" in FACES["markdown"](report)
