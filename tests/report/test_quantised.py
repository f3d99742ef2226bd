"""The section on quantising says what was measured, on every face."""

from __future__ import annotations

import math
from typing import Any

from secateur.pipeline.quantised import Loss, QuantisedFigures, Stage
from secateur.report import quantised
from secateur.report.html import render
from tests.report.reports import report
from tests.report.test_html import Page


def figures(**changes: Any) -> QuantisedFigures:
    def stage(name: str, size: int, accuracy: float, seconds: float) -> Stage:
        return Stage(
            stage=name,
            file_bytes=size,
            loss=0.5,
            measure="loss",
            accuracy=accuracy,
            samples=400,
            seconds=(seconds, seconds, seconds * 2),
        )

    fields: dict[str, Any] = {
        "kind": "int8",
        "runtime": "onnxruntime 1.20",
        "threads": 1,
        "batch": 64,
        "calibrated": 1_024,
        "distance": 0.0012,
        "stages": (
            stage("dense", 4_000_000, 0.9, 0.02),
            stage("pruned", 3_000_000, 0.89, 0.015),
            stage("pruned + int8", 1_000_000, 0.885, 0.005),
        ),
        "losses": (
            Loss(
                bound="accuracy_drop", measure="accuracy", value=0.015, low=-0.002, high=0.03, most=0.028
            ),
        ),
    }  # fmt: skip
    return QuantisedFigures(**(fields | changes))


def test_the_table_compares_with_dense() -> None:
    found = figures()
    assert quantised.titles(found) == (
        "as an ONNX file", "MB", "of dense", "time", "of dense", "accuracy", "loss",
    )  # fmt: skip
    assert quantised.rows(found)[2] == (
        "pruned + int8", "1", "25.0 %", "5.00 ms", "25.0 %", "88.50 %", "0.5",
    )  # fmt: skip


def test_the_sentences_give_the_interval_and_the_verdict() -> None:
    (last,) = quantised.sentences(figures())[2:]
    assert last == (
        "Accuracy: drop of pruned + int8 against the dense model 1.50 points (−0.20 to 3.00, 95 %)."
    )
    asked = Loss(bound="loss_rise", measure="loss", value=0.015, low=0.0, high=0.03, most=0.028, limit=0.02)
    (said,) = quantised.sentences(figures(losses=(asked,)))[2:]
    assert "Asked for at most 2.00 %: not confirmed, it is at most 2.80 %." in said
    (said,) = quantised.sentences(figures(losses=(asked.model_copy(update={"limit": 0.03}),)))[2:]
    assert "confirmed, it is at most 2.80 %" in said
    few = asked.model_copy(update={"low": -math.inf, "high": math.inf, "most": math.inf})
    (said,) = quantised.sentences(figures(losses=(few,)))[2:]
    assert "the samples are too few for an interval" in said
    assert said.endswith("not confirmed.")


def test_every_face_has_it() -> None:
    made = report(quantised=figures())
    for text in (str(made), made.to_markdown(), Page(render(made)).text):
        assert "hen quantised" in text
        assert "25.0" in text
    untimed = figures(stages=tuple(s.model_copy(update={"seconds": ()}) for s in figures().stages))
    assert "time" not in quantised.titles(untimed)
    assert "hen quantised" not in str(report())
