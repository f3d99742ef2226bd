"""How rules competed, on every face of the report."""

from __future__ import annotations

from secateur.pipeline.auto.selection import Candidate, Round, Selection
from secateur.report import selection
from secateur.report.html import render
from secateur.report.report import Report
from tests.report.reports import report

FOUND = Selection(
    measure="distance to dense",
    rounds=(Round(repair="batchnorm", samples=64), Round(repair="", samples=0)),
    held=200,
    candidates=(
        Candidate(name="repair_aware", macs=0.499, params=0.61, errors=(0.25, 0.1234567), verdict="chosen"),
        Candidate(name="<tod>", macs=0.5, params=0.55, errors=(0.5,), verdict="round 1: place 2"),
        Candidate(name="emp", macs=None, params=None, errors=(), verdict="did not run: no labels"),
    ),
)


def test_the_table_has_a_column_for_each_round() -> None:
    assert selection.titles(FOUND) == (
        "rule", "MACs", "parameters", "batchnorm, 64 samples", "as pruned", "outcome",
    )  # fmt: skip
    assert selection.rows(FOUND) == (
        ("repair_aware", "49.9 %", "61.0 %", "0.25", "0.1235", "chosen"),
        ("<tod>", "50.0 %", "55.0 %", "0.5", "", "round 1: place 2"),
        ("emp", "", "", "", "", "did not run: no labels"),
    )


def test_words_say_what_was_measured() -> None:
    many = FOUND.model_copy(update={"candidates": FOUND.candidates * 20})
    left = len(many.candidates) - selection.MOST
    assert f"The {left} others are in the report as JSON" in selection.sentence(many)
    assert len(selection.rows(many)) == len(selection.lines(many)) - 1 == selection.MOST
    assert "others" not in selection.sentence(FOUND)
    assert "200 held-out samples" in selection.sentence(FOUND)
    assert "squared distance" in selection.sentence(FOUND)
    assert selection.sentence(FOUND.model_copy(update={"measure": "loss"})).count("squared") == 0
    assert selection.lines(FOUND)[1:] == (
        "repair_aware: 0.25, 0.123; chosen",
        "<tod>: 0.5; round 1: place 2",
        "emp: did not run: no labels",
    )


def test_every_face_shows_it_and_a_report_without_has_no_such_part() -> None:
    shown, plain = report(selection=FOUND), report()
    assert "rules that competed" in str(shown)
    assert "rules that competed" not in str(plain)
    for face in (shown.to_markdown(), render(shown)):
        assert "Rules that competed" in face
        assert "did not run: no labels" in face
    assert "&lt;tod&gt;" in render(shown)
    assert "Rules that competed" not in render(plain) + plain.to_markdown()
    assert type(shown).from_json(shown.to_json()) == shown


def test_a_report_that_an_older_version_wrote_is_read() -> None:
    shown = report(selection=FOUND)
    old = shown.to_json().replace('"selection":', '"contest":', 1)
    assert '"contest":' in old
    assert Report.from_json(old) == shown
