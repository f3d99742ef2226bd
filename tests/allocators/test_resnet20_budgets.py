"""Fifty random budgets on a real graph: what is achieved is the largest reachable cost within each."""

import functools

import numpy as np
import pytest
import torch

import secateur as sc
from benchmarks.resnet20 import make


@functools.cache
def traced() -> sc.Graph:
    return sc.trace(make(), torch.zeros(2, 3, 32, 32))


@functools.cache
def scored() -> sc.Scores:
    rng = np.random.default_rng(0)
    signals = {
        name: {g.name: rng.exponential(size=g.size) for g in traced().groups}
        for name in ("wasserstein", "taylor", "magnitude")
    }
    return sc.Scores(signals, 1, 10, 0, traced().fingerprint)


def reachable(name: str) -> list[int]:
    """MACs at every value of the rule's knob that changes anything; tests of the curve try each value."""
    graph, scores = traced(), scored()
    sizes = sorted({g.size for g in graph.groups})
    rule: sc.Allocator
    if name == "uniform":
        rule, values = sc.Uniform(), {k / n for n in sizes for k in range(n)} - {0.0}
    else:
        rule, values = sc.ToD(), {j / k for n in sizes for k in range(1, n + 1) for j in range(k + 1)}
    curve = rule.curve(graph, scores)
    assert set(curve.knob[1:].tolist()) <= values
    return sorted(set(curve.macs.tolist()))


@pytest.mark.parametrize("name", ["tod", "uniform"])
def test_fifty_budgets_reach_the_largest_cost_below_the_target(name: str) -> None:
    graph, scores = traced(), scored()
    costs = reachable(name)
    dense = graph.cost().macs
    rule = sc.ToD() if name == "tod" else sc.Uniform()
    fractions = np.random.default_rng(1).uniform(0.001, 0.999, size=50)
    for fraction in [*fractions, 1e-5]:
        budget = sc.Budget(macs=float(fraction), spend=False)
        below = [c for c in costs if c <= fraction * dense]
        if below:
            assert rule.allocate(graph, scores, budget).predicted.macs == max(below)
        else:
            with pytest.raises(sc.UnreachableBudgetError, match="smallest") as caught:
                rule.allocate(graph, scores, budget)
            assert caught.value.smallest == pytest.approx(min(costs) / dense)
