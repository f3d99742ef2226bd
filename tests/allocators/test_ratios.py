from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import secateur as sc
from secateur.allocators import Budget, Limits, Ratios
from secateur.errors import SettingError
from tests.allocators.fake import FakeGraph, random_scores
from tests.allocators.test_limits import network


def lost(plan: sc.Plan) -> dict[str, int]:
    return {group.name: len(group.removed) for group in plan.groups}


def test_each_layer_loses_what_was_given_for_it_and_the_others_nothing() -> None:
    graph: Any = FakeGraph([100, 7, 5])
    scores = random_scores(graph, 0)
    plan = Ratios({"layer0": 0.29, "layer[1]": 0.5}).allocate(graph, scores)
    assert lost(plan) == {"layer0": 29, "layer1": 3, "layer2": 0}
    for group in plan.groups:
        worth = scores["magnitude"][group.name]
        gone = list(group.removed)
        assert not gone or worth[gone].max() < np.delete(worth, gone).min()
    assert plan.settings["ratios"] == {"layer0": 0.29, "layer[1]": 0.5}
    assert plan.settings["factor"] == 1.0


def test_the_last_pattern_that_names_a_layer_decides() -> None:
    graph: Any = FakeGraph([8, 8])
    scores = random_scores(graph, 0)
    assert lost(Ratios({"*": 0.25, "layer1": 0.5}).allocate(graph, scores)) == {"layer0": 2, "layer1": 4}
    assert lost(Ratios({"layer1": 0.5, "*": 0.25}).allocate(graph, scores)) == {"layer0": 2, "layer1": 2}
    assert lost(Ratios({"*": 0.25, "layer1": 0.0}).allocate(graph, scores)) == {"layer0": 2, "layer1": 0}


def test_within_a_budget_the_ratios_are_proportions() -> None:
    graph: Any = FakeGraph([100, 100])
    scores = random_scores(graph, 0)
    budget = Budget(macs=0.6, spend=False)
    plan = Ratios({"layer0": 0.2, "layer1": 0.1}).allocate(graph, scores, budget)
    gone = lost(plan)
    assert gone["layer0"] in (2 * gone["layer1"], 2 * gone["layer1"] + 1)
    assert plan.predicted.macs <= 0.6 * plan.dense.macs
    factor: Any = plan.settings["factor"]
    assert gone["layer0"] == int(np.floor(factor * 0.2 * 100 + 1e-9))


def test_layers_that_only_lose_units_together_have_one_ratio() -> None:
    graph = sc.trace(network(), torch.zeros(2, 4))
    scores = sc.score(graph, None, "magnitude")
    assert lost(Ratios({"block.2": 0.25}).allocate(graph, scores))["first"] == 2
    assert lost(Ratios({"first": 0.25, "block": 0.25}).allocate(graph, scores)) == {
        "first": 2,
        "block.0": 1,
        "last.0": 0,
    }
    with pytest.raises(
        SettingError, match=r"only lose units together, got first: 0\.25, block\.2: 0\.5\. Give"
    ):
        Ratios({"first": 0.25, "block": 0.5}).allocate(graph, scores)


def test_limits_hold() -> None:
    graph: Any = FakeGraph([16, 16])
    scores = random_scores(graph, 0)
    rule = Ratios({"*": 0.5})
    assert lost(rule.allocate(graph, scores, limits=Limits(min_keep=10))) == {"layer0": 6, "layer1": 6}
    assert lost(rule.allocate(graph, scores, limits=Limits(ignore=("layer1",)))) == {
        "layer0": 8,
        "layer1": 0,
    }
    # A pattern whose groups are all ignored has matched all the same.
    assert lost(Ratios({"layer1": 0.5}).allocate(graph, scores, limits=Limits(ignore=("layer1",)))) == {
        "layer0": 0,
        "layer1": 0,
    }


def test_single_weights_are_named_by_tensor_or_layer() -> None:
    weights = sc.trace(network(), granularity="weight")
    plan = Ratios({"block": 0.5, "first.weight": 0.25}).allocate(weights, sc.score(weights))
    gone = {name: int((~mask).sum()) / mask.size for name, mask in plan.masks.items()}
    assert gone == {
        "first.weight": 0.25,
        "block.0.weight": 0.5,
        "block.2.weight": 0.5,
        "last.0.weight": 0,
        "last.2.weight": 0,
    }


@pytest.mark.parametrize(
    ("ratios", "message"),
    [
        (
            {"layer0": 0.5, "Layer*": 0.5},
            r"to match a layer, got 'Layer\*', which matches none\. Choose among",
        ),
        ({}, r"Ratios: expected a ratio above 0 for at least one layer, got none"),
        ({"layer0": 0.0}, r"Ratios: expected a ratio above 0"),
        ({"layer0": 1.0}, r"Ratios: expected layer0 in \[0, 1\), got 1\.0"),
        ({"layer0": "half"}, r"Ratios: expected layer0 in \[0, 1\), got 'half'"),
        ({3: 0.5}, r"Ratios: expected a mapping from names to fractions, got \{3: 0\.5\}"),
        ([0.5], r"Ratios: expected a mapping from names to fractions, got \[0\.5\]"),
    ],
)
def test_what_cannot_be_followed_is_refused(ratios: Any, message: str) -> None:
    graph: Any = FakeGraph([4, 4])
    with pytest.raises(SettingError, match=message):
        Ratios(ratios).allocate(graph, random_scores(graph, 0))
