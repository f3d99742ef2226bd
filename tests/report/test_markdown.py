from __future__ import annotations

import re

import pytest
from markdown_it import MarkdownIt

from secateur.report.data import Kept, Layer
from secateur.report.markdown import document, escape
from tests.report.reports import report

ATTACK = "<script>alert(1)</script>\n# `x` | *y* [z](javascript:1) ![i](j) _u_ &amp;"


def rendered(text: str) -> str:
    return MarkdownIt("commonmark").enable("table").render(text)


def test_it_has_what_the_page_has() -> None:
    page = " ".join(re.sub(r"<[^>]+>", " ", rendered(document(report()))).split())
    for figure in (
        "DigitsNet, pruned",
        "at most 50 % of the MACs",
        "99.17 %",
        "89.72 %, −9.45",
        "18.91 M, 46.3 %",
        "2.85 (2.81–2.89), 82.6 %",
        "stem (+2) 10 6 16 62.5 %",
        "0.25 46.3 % 52.0 % the plan",
        "stem wasserstein (removal) 0.5 2 1.25 ▆▃· ·▆█",
        "stem taylor (protection) 0.01 1 – ▅▃ ▄█",
        "its output differs by 3.1e-16 relative",
        "batchnorm: kept; loss 3.63 before and 0.56 after",
        "stem.weight 0.5 0.125",
        "Over all layers 19 units went",
        "body.conv 13 2 3 – –",
        "mixed by layer_norm: norm (at net.py:12)",
        "tolerance 0.25, solved for the budget",
        "seed 7",
        "score 1.25 s",
        "torch 2.13.0",
        "The pruned model is 1.21 times as fast.",
        "model = sc.load(&quot;demo&quot;, make_model)",
    ):
        assert figure in page, figure


def test_its_tables_have_as_many_cells_as_titles() -> None:
    text = document(report())
    tables = re.findall(r"(?:^\|.*\|\n?)+", text, re.MULTILINE)
    assert len(tables) == rendered(text).count("<table>") == 9
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def test_names_and_reasons_stay_text() -> None:
    text = document(
        report(
            model=ATTACK,
            layers=(Layer(group=ATTACK, kept=1, total=2, producers=()),),
            untouched=(Kept(what=ATTACK, reason=ATTACK, where=ATTACK),),
            note=ATTACK,
            repairs=({"method": ATTACK, "kept": False, "why": ATTACK},),
            certificates={ATTACK: ATTACK},
            versions={ATTACK: ATTACK},
            artefact=ATTACK,
        )
    )
    page = rendered(text)
    for tag in ("<script", "<a ", "<img", "<em>"):
        assert tag not in page
    assert page.count("<h1>") == 1
    assert page.count("&lt;script&gt;") > 8


def test_unescaped_names_would_be_markup() -> None:
    page = rendered(ATTACK)
    assert "<script" in page
    assert "<a " not in rendered(escape(ATTACK))
    assert rendered(escape(ATTACK)).count("<p>") == 1


@pytest.mark.parametrize("removed", ["knob", "artefact"])
def test_what_is_not_known_has_no_heading(removed: str) -> None:
    heading = {"knob": "would leave", "artefact": "Load it again"}[removed]
    assert heading in document(report())
    assert heading not in document(report(**{removed: None}))


def test_the_sizes_of_the_inputs() -> None:
    page = " ".join(re.sub(r"<[^>]+>", " ", rendered(document(report()))).split())
    assert f"Sizes of the inputs {report().takes}" in page
    assert "Sizes of the inputs" not in document(report(takes=""))
    assert "<script>" not in rendered(document(report(takes=ATTACK)))
