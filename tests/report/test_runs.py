"""Several runs beside each other say what differs, and what makes them hard to compare."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from secateur.errors import SettingError
from secateur.report.runs import TITLES, Runs
from tests.cli.conftest import refused, run
from tests.report.reports import DENSE, PRUNED, REPAIRED, report
from tests.report.test_html import Page


def other(**changes: Any) -> Any:
    """A run that kept more of one layer, and was not repaired."""
    first, second = report().layers
    layers = (first.model_copy(update={"kept": 16}), second)
    figures = (DENSE, PRUNED.model_copy(update={"macs": 20_406_592, "accuracy": 0.5}))
    return report(**({"layers": layers, "figures": figures, "rule": "emp"} | changes))


def test_each_run_is_a_row_and_each_layer_a_bar_for_each() -> None:
    found = Runs.of([("a", report()), ("b", other())])
    rows = {row[0]: dict(zip(TITLES, row, strict=True)) for row in found.rows()}
    assert (rows["a"]["MACs"], rows["b"]["MACs"]) == ("46.3 %", "50.0 %")
    assert (rows["a"]["quality"], rows["b"]["quality"]) == ("89.72 %", "50.00 %")
    assert rows["b"]["rule"] == "emp"
    assert rows["a"]["dense"] == "99.17 %"
    label, bars = found.layers()[0]
    assert label.startswith("stem")
    assert [(b.run, b.kept, b.total) for b in bars] == [("a", 10, 16), ("b", 16, 16)]
    text = str(found)
    assert "10 / 16" in text
    assert "100.0 %" in text
    assert not any("models differ" in line for line in found.doubts())


def test_what_is_hard_to_compare_is_said() -> None:
    def doubts(**changes: Any) -> str:
        return " ".join(Runs.of([("a", report()), ("b", other(**changes))]).doubts())

    assert "The dense models differ" in doubts(model="Other")
    assert "Quality was measured on different data: a: evaluation data" in doubts(judged_on="my data")
    worse = DENSE.model_copy(update={"loss": 0.5})
    assert "their weights or the data differ" in doubts(figures=(worse, PRUNED))
    assert "Latencies were measured in different runs" in doubts()
    still = [f.model_copy(update={"latency": None}) for f in (DENSE, REPAIRED)]
    assert "Latencies" not in doubts(figures=tuple(still))


def test_fewer_than_two_are_refused() -> None:
    for few in ([], [("a", report())], [("a", report()), ("a", other())]):
        with pytest.raises(SettingError, match="at least two runs, each once"):
            Runs.of(few)


def test_the_page_shows_all_and_escapes_names() -> None:
    odd = other(model="<script>x</script>")
    page = Runs.of([("a", report()), ("<b>", odd)]).html()
    assert "<script" not in page
    text = " ".join(Page(page).text.split())
    assert "2 runs beside each other" in text
    assert "<script>x</script>" in text
    assert "10 / 16" in text
    assert page.count('class="lane"') == 4


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("one").mkdir()
    report().to_json("one/report.json")
    other().to_json("two.json")
    done = run("compare-runs", "one", "two.json", "--html", "page.html")
    assert done.exit_code == 0, done.stderr
    assert "page in    page.html" in done.stdout
    assert "beside each other" in Path("page.html").read_text()
    found = json.loads(run("compare-runs", "one", "two.json", "--json").stdout)
    assert [r["run"] for r in found["runs"]] == ["one", "two.json"]
    assert "at least two runs" in refused(2, "compare-runs", "one")
    assert "report" in refused(2, "compare-runs", "one", "none")
