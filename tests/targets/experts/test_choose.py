"""Rules for experts that compete."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import secateur as sc
from secateur.errors import BudgetError, NothingToPruneError
from secateur.pipeline.targets.experts import CANDIDATES as DEFAULT
from secateur.pipeline.targets.experts import Experts
from tests.targets.experts.models import make, words


def data(labels: bool = True) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": part} | ({"labels": part} if labels else {}) for part in words(20, 16).chunk(5)]


def prune(given: Any, allocator: Any, budget: Any, **settings: Any) -> Any:
    return sc.prune(
        make("qwen2"), given, budget, allocator, "expert", measure_latency=False, progress=False, **settings
    )


@pytest.mark.parametrize("repair", [None, "auto"])
def test_the_winner_gives_what_its_rule_gives_alone(repair: str | None) -> None:
    result = prune(data(), "auto", sc.Budget(experts=0.5), repair=repair)
    contest = result.report.selection
    assert {c.name for c in contest.candidates} == set(DEFAULT)
    first = contest.candidates[0]
    rounds = len(contest.rounds)
    assert contest.measure == "loss"  # the model's own, since the batches hold its labels
    assert first.errors[-1] == min(c.errors[-1] for c in contest.candidates if len(c.errors) == rounds)
    alone = prune(data(), DEFAULT[first.name](), sc.Budget(experts=0.5), repair=repair)
    assert result.plan.to_json() == alone.plan.to_json()
    assert sum(g.kept for g in result.plan.groups) == 8
    pairs = zip(result.model.parameters(), alone.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert (result.report.asked["allocator"], result.report.rule) == ("auto", alone.plan.allocator)
    assert [r.repair for r in contest.rounds] == ["" if repair is None else "experts"]
    assert {layer.group: set(layer.scores) for layer in result.report.layers} == {
        layer.group: set(layer.scores) for layer in alone.report.layers
    }


def test_without_labels_tod_does_not_run_and_cannot_say_how_many() -> None:
    result = prune(data(labels=False), "auto", sc.Budget(experts=0.5))
    assert result.report.selection.measure == "divergence from dense"
    verdicts = {c.name: c.verdict for c in result.report.selection.candidates}
    assert {n for n, v in verdicts.items() if "did not run" in v and "labels" in v} == {
        "tod",
        "tod, frequency",
    }
    with pytest.raises(BudgetError, match="labels for tod"):
        prune(data(labels=False), "auto", None)
    with pytest.raises(NothingToPruneError, match="labels"):
        prune(data(labels=False), sc.Auto({"a": Experts.rule("tod")}), sc.Budget(experts=0.5))


def test_without_a_budget_tod_says_how_many() -> None:
    result = prune(data(), "auto", None)
    alone = prune(data(), "tod", None)
    assert sum(g.kept for g in result.plan.groups) == sum(g.kept for g in alone.plan.groups)
