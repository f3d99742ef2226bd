from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from secateur.errors import ArtefactError, SettingError
from secateur.report.html import render
from secateur.report.markdown import document
from secateur.report.report import Report
from secateur.report.text import table
from tests.report.reports import DENSE, PRUNED, report


def test_what_is_read_back_is_what_was_written(tmp_path: Path) -> None:
    text = report().to_json(tmp_path / "report.json")
    assert (tmp_path / "report.json").read_text(encoding="utf-8") == text
    for again in (Report.from_json(text), Report.from_json(tmp_path / "report.json")):
        assert again == report()
        assert (str(again), render(again), document(again)) == (
            table(report()),
            render(report()),
            document(report()),
        )


def test_figures_that_are_not_finite_survive(tmp_path: Path) -> None:
    tried = {"method": "bias", "kept": False, "measure": "loss", "before": math.nan, "after": math.inf}
    lost = report(
        figures=(DENSE, PRUNED.model_copy(update={"loss": math.nan})),
        repairs=({**tried, "held_out_samples": 6},),
    )
    again = Report.from_json(lost.to_json())
    assert math.isnan(again.figures[1].loss)
    assert table(again) == table(lost)
    assert "loss not finite before and not finite after" in " ".join(table(again).split())
    assert render(again) == render(lost)
    assert document(again) == document(lost)


def test_an_older_report_without_the_newer_parts_is_shown() -> None:
    data = json.loads(report().to_json())
    for name in ("format", "calibration", "knob", "make_model"):
        del data[name]
    for figures in data["figures"]:
        del figures["samples"], figures["latency_runs"]
    for layer in data["layers"]:
        del layer["scores"]
    for entry in data["repairs"]:
        del entry["layers"]
    old = Report.from_json(json.dumps(data))
    for shown in (table(old), render(old), document(old)):
        assert "46.3 %" in shown
        assert "the cut" not in shown
        assert "would leave" not in shown
        assert "pass by pass" not in shown


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"model": ', "damaged or cut short"),
        ('{"format": "1"}', "whose format is '1'"),
        ('{"format": 2}', "which a newer secateur wrote"),
        ('{"model": "Net"}', "Field required"),
        ('{"format": true}', "whose format is True"),
    ],
)
def test_what_is_no_report_is_refused(text: str, said: str) -> None:
    with pytest.raises(ArtefactError, match=said):
        Report.from_json(text)


def test_what_it_does_not_know_it_refuses() -> None:
    data = json.loads(report().to_json()) | {"colour": "red"}
    with pytest.raises(ArtefactError, match=r"Extra inputs .*\(in colour\)"):
        Report.from_json(json.dumps(data))


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[1]", b"", None])
def test_files_that_hold_no_report_are_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "report.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ArtefactError, match=r"report '.*report\.json': expected"):
        Report.from_json(path)


@pytest.mark.parametrize("write", ["to_json", "to_html", "to_markdown"])
def test_a_file_is_the_old_one_or_the_new_one(
    tmp_path: Path, write: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.out"
    path.write_text("old")

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("secateur.artefact.writing.os.replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            getattr(report(), write)(path)
    assert path.read_text() == "old"
    getattr(report(), write)(path)
    assert path.read_text(encoding="utf-8") != "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="expected a place that can be written to"):
        report().to_markdown(tmp_path / "nowhere" / "report.md")
    with pytest.raises(SettingError, match="expected a place that can be written to"):
        report().to_html(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_markdown_is_returned_and_written(tmp_path: Path) -> None:
    text = report().to_markdown(tmp_path / "report.md")
    assert text == report().to_markdown() == (tmp_path / "report.md").read_text(encoding="utf-8")
