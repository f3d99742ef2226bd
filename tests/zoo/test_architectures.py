"""Whole architectures: traced, 30 % of every group removed at random, and proven, in both forms."""

from __future__ import annotations

import pytest
import torch

import secateur as sc
from tests.targets.units.plans import random_plan
from tests.zoo.models import ENTRIES, Entry

QUICK = frozenset({"resnet18"})
"""Those that `make test` runs too. Channels that are split and shuffled are among the topologies."""


def _marked(entry: Entry) -> object:
    return pytest.param(entry, id=entry.name, marks=() if entry.name in QUICK else pytest.mark.slow)


@pytest.mark.parametrize("entry", [_marked(e) for e in ENTRIES])
def test_an_architecture(entry: Entry) -> None:
    if not entry.available():
        pytest.skip(f"{entry.family} is not installed")
    model = entry.make()
    inputs = entry.inputs(1)
    graph = sc.trace(model, inputs)
    uncovered = [f for f in graph.frozen if f.reason.startswith(("no rule", "the rule for"))]
    assert not uncovered
    assert graph.static_batch is None
    plan = random_plan(graph, 0.3)
    assert all(g.removed for g in plan.groups)
    assert plan.predicted.macs < 0.75 * plan.dense.macs
    for form in ("graph", "auto"):
        small = sc.apply(model, plan, form, graph=graph, example_inputs=inputs)
        assert sum(p.numel() for p in small.parameters()) == plan.predicted.params
        proof = sc.verify(model, small, plan, inputs)
        assert proof.reference == "masked"
        assert proof.difference <= 1e-9
        with torch.no_grad():
            assert torch.isfinite(small.eval()(*inputs)).all()
