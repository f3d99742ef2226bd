"""`secateur report`, on what a run wrote down."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from secateur.report.html import render
from secateur.report.report import Report
from tests.cli.conftest import refused, run
from tests.report.reports import report


@pytest.fixture
def artefact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a report, in an empty current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small").mkdir()
    saved = report(artefact="small", make_model="from net import make as make_model")
    saved.to_json(tmp_path / "small" / "report.json")
    return tmp_path / "small"


def test_it_prints_the_table_again_and_writes_nothing(artefact: Path) -> None:
    result = run("report", "small")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == str(Report.from_json(Path("small/report.json"))) + "\n"
    assert "\n  # from net import make as make_model\n" in result.stdout  # a stranger's code, perhaps
    assert sorted(path.name for path in artefact.rglob("*")) == ["report.json"]


def test_the_page_and_markdown_are_what_the_run_would_write(artefact: Path) -> None:
    result = run("report", "small", "--html", "a.html", "--markdown", "a.md")
    assert result.exit_code == 0, result.stderr
    assert "report in   a.html, a.md" in result.stdout
    saved = Report.from_json(Path("small/report.json"))
    assert Path("a.html").read_text(encoding="utf-8") == render(saved)
    assert Path("a.md").read_text(encoding="utf-8") == saved.to_markdown()


def test_the_example_in_its_help_runs(artefact: Path) -> None:
    found = re.search(r"Example: secateur (.*\S)", run("report", "--help").stdout)
    assert found is not None
    result = run(*shlex.split(found[1]))
    assert result.exit_code == 0, result.stderr
    assert Path("report.md").read_text(encoding="utf-8").startswith("# DigitsNet, pruned")


def test_a_folder_that_moved_is_loaded_from_where_it_is(artefact: Path) -> None:
    artefact.rename("elsewhere")
    result = run("report", "elsewhere", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["artefact"] == "elsewhere"
    assert 'sc.load("elsewhere", make_model)' in run("report", "elsewhere").stdout
    assert 'sc.load("small", make_model)' in run("report", "elsewhere/report.json").stdout


def test_a_run_is_shown_again_as_it_was(folder: Path) -> None:
    pruned = run(
        "prune", "--model", "net.py:make", "--data", "net.py:load", "--macs", "0.5", "--out", "small"
    )
    assert pruned.exit_code == 0, pruned.stderr
    again = run("report", "small", "--html", "again.html")
    assert again.exit_code == 0, again.stderr
    line = "import runpy; make_model ="
    told = f"# from report {str(Path('small/report.json'))!r}; read it before you run it:"
    page = Path("small/report.html").read_text(encoding="utf-8")
    assert Path("again.html").read_text(encoding="utf-8") == page.replace(
        line, f"{told.replace(chr(39), '&#39;')}\n# {line}"
    )
    assert again.stdout.startswith(pruned.stdout.replace(f"  {line}", f"  {told}\n  # {line}"))


def test_json_is_all_there_is_on_stdout(artefact: Path) -> None:
    result = run("report", "small", "--json", "--markdown", "a.md")
    assert Report.from_json(result.stdout) == Report.from_json(artefact / "report.json")
    assert Path("a.md").exists()


def test_what_is_missing_or_damaged_is_said_in_one_line(artefact: Path) -> None:
    assert "expected a readable file of JSON" in refused(2, "report", "nowhere")
    (artefact / "report.json").write_text('{"format": 1, "mod')
    assert "damaged or cut short" in refused(2, "report", "small")
    (artefact / "report.json").write_text('{"format": 9}')
    assert "Upgrade secateur" in refused(2, "report", "small")


@pytest.mark.parametrize("option", ["--html", "--markdown"])
@pytest.mark.parametrize("place", ["small", "nowhere/a.out"])
def test_a_place_that_cannot_be_written_is_refused_before_anything_is(
    artefact: Path, option: str, place: str
) -> None:
    other = "--markdown" if option == "--html" else "--html"
    assert option in refused(2, "report", "small", option, place, other, "fine.out")
    assert not Path("fine.out").exists()


def test_without_jinja_only_the_page_is_refused(artefact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert 'pip install "secateur[report]"' in refused(2, "report", "small", "--html", "a.html")
    assert run("report", "small", "--markdown", "a.md").exit_code == 0
