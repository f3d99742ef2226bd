"""A plan's certificates in sentences."""

from __future__ import annotations

from typing import Any

import numpy as np

from secateur.allocators import EMP, Budget, Repairability, ToD
from secateur.allocators.description import Certificate
from secateur.report.outcomes import asked
from tests.allocators.fake import FakeGraph
from tests.report.reports import CERTIFICATES, report

EXCHANGE: dict[str, Any] = {
    "ratio": 0.25,
    "macs": [18_910_000, 18_800_000],
    "params": [91_606, 90_000],
    "loss": 0.08,
    "other_loss": 0.11,
    "taken": 0.02,
    "spared": 0.05,
    "groups": {
        "stem": {"other_removed": 4, "loss": 0.03, "other_loss": 0.01, "taken": 0.02, "spared": 0.0},
        "body.conv": {"other_removed": 16, "loss": 0.05, "other_loss": 0.1, "taken": 0.0, "spared": 0.05},
    },
}


def said(**certificates: Any) -> Certificate:
    return ToD().certificate(CERTIFICATES | certificates)


def test_the_exchange_says_what_for_what_and_what_it_assumes() -> None:
    found = said(exchange=EXCHANGE)
    text = " ".join(found.sentences)
    assert "within the same budget leaves 18.8 M MACs (18.91 M here)" in text
    assert "removes units that hold 2.0 % of the network's protection score" in text
    assert "keeps units that hold 5.0 %" in text
    assert "lowers the protection score removed from 11.0 % to 8.0 %." in text
    assert "as far as damage adds up over the removed units" in text
    assert found.titles[-2:] == ("uniform removes", "exchange")
    assert [row[-2:] for row in found.rows] == [("4", "+2.00"), ("16", "\N{MINUS SIGN}5.00")]
    worse = " ".join(said(exchange=EXCHANGE | {"loss": 0.12}).sentences)
    assert "raises the protection score removed from 11.0 % to 12.0 %." in worse


def test_without_shares_only_counts_are_compared() -> None:
    groups = {name: {"other_removed": 3, "taken": None, "spared": None} for name in ("stem", "body.conv")}
    found = said(exchange=EXCHANGE | {"loss": None, "groups": groups})
    assert len(found.sentences) == 2
    assert [row[-2:] for row in found.rows] == [("3", "–"), ("3", "–")]
    assert len(said(exchange=None).titles) == 6


def test_units_that_came_back_and_constant_scores_are_named() -> None:
    groups = {name: g | {"allowed": g["removed"] + 2} for name, g in CERTIFICATES["groups"].items()}
    assert "4 units that this tolerance lets go stayed, to spend the budget." in " ".join(
        said(groups=groups).sentences
    )
    text = " ".join(said(constant={"stem": ["wasserstein", "taylor"]}).sentences)
    assert "In stem every unit has the same score from taylor and wasserstein" in text


def test_what_a_plan_carries_can_be_put_in_words() -> None:
    graph: Any = FakeGraph([20, 30])
    rng = np.random.default_rng(0)
    scores = {s: {g.name: rng.uniform(size=g.size) for g in graph.groups} for s in ToD().signals}
    plan = ToD().allocate(graph, scores, Budget(macs=0.5))
    found = ToD().certificate(plan.certificates)
    assert len(found.sentences) == 5
    assert {len(row) for row in found.rows} == {len(found.titles)} == {8}
    assert asked(report(asked={"allocator": "tod", "budget": plan.budget})).startswith(
        "at most 50 % of the MACs, allocator tod"
    )


def planned(rule: Any, budget: Budget | None = None) -> Certificate:
    graph: Any = FakeGraph([20, 30])
    rng = np.random.default_rng(0)
    scores = {s: {g.name: rng.uniform(size=g.size) for g in graph.groups} for s in rule.signals}
    plan = rule.allocate(graph, scores, budget)
    found: Certificate = rule.certificate(plan.certificates)
    assert "what" not in found.titles  # the rule's own sentences, not a list of its values
    assert {len(row) for row in found.rows} <= {len(found.titles)}
    return found


def test_effective_sizes_say_what_stays_and_what_had_to() -> None:
    by_layer = planned(EMP(beta=0.75))
    assert by_layer.sentences[0].startswith("Of each layer, β = 0.75 times the effective number")
    assert by_layer.titles[-1] == "at least"
    for row in by_layer.rows:
        kept, bound = (float(row[i].removesuffix(" %")) for i in (3, 6))
        assert 0 < bound <= kept < 100
    whole = planned(EMP(beta=0.75, scope="model"))
    assert "whatever the scores with this effective number" in whole.sentences[1]
    assert len(whole.titles) == 4
    idle = EMP().certificate({"beta": None, "scope": "layer", "whole": {}, "groups": {}})
    assert "Nothing had to go" in idle.sentences[0]


def test_residuals_are_predicted_for_each_layer_and_named_at_their_worst() -> None:
    found = Repairability().certificate({"residual": {"a": 0.125, "b": 0.25}, "sum": 0.375})
    assert "18.8 % distortion in the mean, and 25.0 % in b, the most." in found.sentences[0]
    assert found.rows == (("a", "12.5 %"), ("b", "25.0 %"))
    nothing = Repairability().certificate({"residual": {}, "sum": 0})
    assert "nothing to predict" in nothing.sentences[0]
