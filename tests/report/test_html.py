from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from secateur.errors import SettingError
from secateur.report import html
from secateur.report.data import Kept, Layer
from secateur.report.html import render
from tests.report.reports import DENSE, PRUNED, report

ATTACK = "<script>alert(1)</script>\" onmouseover='x'"
VOID = {"meta", "link", "br", "wbr"}


class Page(HTMLParser):
    """Checks nesting, and collects text, tags and attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sentences: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.feed(page)
        self.close()
        assert not self.open, self.open
        self.text = " ".join("".join(self.sentences).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self.sentences.append(" ")  # but not where <wbr> breaks a name

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.sentences.append(data)


def test_the_page_has_the_figures() -> None:
    text = Page(render(report())).text
    for figure in (
        "99.17 %",
        "15.56 %",
        "89.72 %",
        "40.81 M",
        "18.91 M",
        "46.3 %",
        "0.370",
        "2.85 (2.81–2.89)",
    ):
        assert figure in text, figure
    assert "18.91 M of 40.81 M" in text
    assert "2.85 ms of 3.45 ms" in text
    assert "10 / 16" in text
    assert "51 / 64" in text


def test_the_page_has_the_findings() -> None:
    text = Page(render(report())).text
    assert "its output differs by 3.1e-16 relative" in text
    assert "batchnorm: kept; loss 3.63 before and 0.56 after" in text
    assert "model output: head.weight axis 0, head.bias axis 0" in text
    assert "mixed by layer_norm: norm net.py:12" in text
    assert "tolerance 0.25, solved for the budget" in text
    assert "score 1.25 s" in text
    assert "torch 2.13.0" in text
    assert 'model = sc.load("demo", make_model)' in text


def test_bars_are_as_long_as_what_was_kept() -> None:
    widths = [
        value for name, value in Page(render(report())).attributes if name == "style" and "width" in value
    ]
    # What two layers kept, and the errors of two before and after repair, relative to the largest.
    assert widths[:2] == ["width:62.50%", "width:79.69%"]
    assert widths[2:] == [f"width:{share}%" for share in ("100.00", "25.00", "50.00", "12.50")]


def test_certificates_are_put_in_words() -> None:
    text = Page(render(report())).text
    assert "of the k units that a layer lost, at most 25 % are among the k of that layer" in text
    assert "Over all layers 19 units went; 3 of them were among those, and 4 was the limit." in text
    assert "stem 6 1 1 17.8 % 39.9 %" in text
    assert "body.conv 13 2 3 – –" in text


def test_certificates_of_another_kind_are_listed_and_none_not_at_all() -> None:
    text = Page(render(report(certificates={"n_eff": 3.5}))).text
    assert "n_eff 3.5" in text
    assert "guarantees or predicts" in text
    assert "guarantees or predicts" not in Page(render(report(certificates={}))).text


def test_names_and_reasons_are_escaped() -> None:
    page = render(
        report(
            model=ATTACK,
            layers=(Layer(group=ATTACK, kept=1, total=2, producers=(f"{ATTACK}.weight", "b.weight")),),
            untouched=tuple(Kept(what=f"{ATTACK}{i}", reason=ATTACK, where=ATTACK) for i in range(9)),
            note=ATTACK,
            repairs=({"method": ATTACK, "kept": False, "why": ATTACK},),
            certificates={ATTACK: ATTACK},
            versions={ATTACK: ATTACK},
            artefact=ATTACK,
        )
    )
    parsed = Page(page)
    assert "script" not in parsed.tags
    assert not [name for name, _ in parsed.attributes if name.startswith("on")]
    assert parsed.text.count("<script>alert(1)</script>") > 10


def test_nothing_comes_from_elsewhere() -> None:
    page = render(report())
    assert not re.search(r"https?:|//|@import|url\(", page)
    assert [value for name, value in Page(page).attributes if name in ("src", "href")] == ["data:,"]


def test_it_follows_light_and_dark_and_width() -> None:
    page = render(report())
    assert "prefers-color-scheme: dark" in page
    assert "@media print" in page
    assert 'name="viewport"' in page


def test_a_report_without_accuracy_latency_and_artefact_renders() -> None:
    bare = {"accuracy": None, "latency": None, "latency_quartiles": None}
    figures = (DENSE.model_copy(update=bare), PRUNED.model_copy(update=bare))
    text = Page(render(report(figures=figures, artefact=None, untouched=(), certificates={}))).text
    assert "accuracy" not in text
    assert "Latency" not in text
    assert "Load it again" not in text
    assert "Nothing: every layer was open to pruning." in text


def test_to_html_writes_the_page(tmp_path: Path) -> None:
    path = report().to_html(tmp_path / "report.html")
    assert path.read_text(encoding="utf-8") == render(report())


def test_without_jinja_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    html._template.cache_clear()
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(SettingError, match=r'pip install "secateur\[report\]"'):
        render(report())


def test_the_sizes_of_the_inputs() -> None:
    text = Page(render(report())).text
    assert "Sizes of the inputs" in text
    assert report().takes in text
    assert "Sizes of the inputs" not in Page(render(report(takes=""))).text
    assert "script" not in Page(render(report(takes=ATTACK))).tags
