"""What real runs put into their reports, for every granularity."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import secateur as sc
from secateur.report import sentences
from secateur.report.html import render
from tests.helpers.models import build
from tests.pipeline.test_prune import loader
from tests.targets.experts.models import make
from tests.targets.experts.models import words as tokens


def unit() -> Any:
    return sc.prune(build("residual", torch.float32), loader(), sc.Budget(macs=0.6), "tod", progress=False)


def weight() -> Any:
    model = build("residual", torch.float32)
    return sc.prune(model, loader(), sc.Budget(sparsity=0.6), granularity="weight", progress=False)


def expert() -> Any:
    data = [{"input_ids": part, "labels": part} for part in tokens(20, 16).chunk(5)]
    return sc.prune(make("qwen2"), data, sc.Budget(experts=0.5), "tod", "expert", progress=False)


@pytest.mark.parametrize("run", [unit, weight, expert])
def test_a_run_fills_in_the_report(run: Any) -> None:
    result = run()
    report = result.report
    assert sc.Report.from_json(report.to_json()) == report
    assert report.takes == sc.record_of(result.model).takes
    assert report.takes.startswith("It is not known which" if run is expert else "You may change ")
    assert report.calibration.get("samples", 0) == result.scores.samples
    assert all(f.samples for f in report.figures)
    assert report.asked["loss"] == "default"
    for layer in report.layers:
        assert [h.signal for h in layer.scores] == list(result.scores.signals)
        for found in layer.scores:
            assert (sum(found.kept), sum(found.kept) + sum(found.removed)) == (layer.kept, layer.total)
    removal = str(report.settings["removal"])
    cuts = [h.cut for layer in report.layers for h in layer.scores if h.signal == removal and sum(h.removed)]
    assert cuts
    assert None not in cuts  # every rule takes the lowest first
    if run is not weight:
        assert report.knob is not None
        assert report.knob.macs[0] == report.figures[0].macs
        assert len(report.figures[1].latency_runs) >= 5
    if run is unit:
        kept = [entry for entry in report.repairs if entry["kept"]]
        refits = sentences.refits(report)
        assert bool(refits) == any("layers" in entry or "reconstruct" in entry["method"] for entry in kept)
        assert report.knob.values[report.knob.at] == report.settings["tolerance"]
    page = render(report)
    assert "What the units were worth, and the cut" in page
