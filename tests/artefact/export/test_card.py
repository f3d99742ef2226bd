from __future__ import annotations

from typing import Any

import pytest
import torch
import yaml
from torch import nn

import secateur as sc
from secateur.common.formatting import number
from secateur.report import proofs
from secateur.report.markdown import escape


def result() -> Any:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    data = [(torch.randn(10, 4), torch.arange(10) % 3) for _ in range(5)]
    return sc.prune(net, data, sc.Budget(macs=0.5), progress=False)


def front(text: str) -> dict[str, Any]:
    """The front matter, as a hub reads it."""
    opening, matter, _ = text.split("---\n", 2)
    assert opening == ""
    found: dict[str, Any] = yaml.safe_load(matter)
    return found


def test_figures_are_those_of_the_report() -> None:
    found = result()
    text = sc.model_card(
        found.model, found.report, name="tiny", base_model="me/dense", license="mit", dataset="digits"
    )
    head = front(text)
    assert (head["license"], head["base_model"], head["datasets"]) == ("mit", "me/dense", ["digits"])
    assert "secateur" in head["tags"]
    (model,) = head["model-index"]
    best = found.report.figures[-1]
    assert model["results"][0]["metrics"][0]["value"] == pytest.approx(best.accuracy, abs=1e-6)
    rows = {
        cells[1]: cells[2:-1]
        for line in text.splitlines()
        if line.startswith("| ")
        for cells in [[cell.strip() for cell in line.split("|")]]
    }
    stages = found.report.figures
    assert rows["top-1 accuracy"] == [f"{f.accuracy:.2%}" for f in stages]
    assert rows["MACs for one sample"][0] == number(stages[0].macs)
    assert rows["MACs for one sample"][1].startswith(number(stages[1].macs) + " (")
    assert escape(proofs.paragraph(found.report)) in text
    assert "secateur as sc" in text


def test_the_hub_reads_it() -> None:
    hub = pytest.importorskip("huggingface_hub")
    found = result()
    text = sc.model_card(found.model, found.report, license="apache-2.0", dataset="digits")
    card = hub.ModelCard(text)
    assert card.data.license == "apache-2.0"
    assert card.data.eval_results[0].metric_value == pytest.approx(
        found.report.figures[-1].accuracy, abs=1e-6
    )


def test_without_a_report_the_record_speaks_and_what_is_unknown_is_left_out() -> None:
    found = result()
    text = sc.model_card(found.model)
    head = front(text)
    assert set(head) == {"library_name", "tags"}
    plan = found.plan
    assert number(plan.predicted.macs) in text
    assert f"{sum(g.size - g.kept for g in plan.groups):,} of {sum(g.size for g in plan.groups):,}" in text
    assert "accuracy" not in text
    assert "## Figures" not in sc.model_card(nn.Linear(2, 2))
