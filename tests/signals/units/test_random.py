from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from scipy.stats import kstest
from torch import nn

from secateur.graph.trace import trace
from secateur.signals import score
from tests.helpers.models import build


def test_by_seed_and_group_alone() -> None:
    graph = trace(build("residual"), torch.randn(2, 3, 8, 8, dtype=torch.float64))
    scores = score(graph, signals="random", seed=3)["random"]
    again = score(graph, signals=("magnitude", "random"), seed=3)["random"]
    part = score(replace(graph, groups=graph.groups[1:2]), signals="random", seed=3)["random"]
    other = score(graph, signals="random", seed=4)["random"]
    for group, vector in scores.items():
        np.testing.assert_array_equal(again[group], vector)
        assert not np.isin(other[group], vector).any()
    name = graph.groups[1].name
    np.testing.assert_array_equal(part[name], scores[name])
    everything = np.concatenate(list(scores.values()))
    assert len(np.unique(everything)) == len(everything)


def test_uniform() -> None:
    net = nn.Sequential(nn.Linear(2, 3000), nn.ReLU(), nn.Linear(3000, 2))
    scores = score(trace(net, torch.randn(2, 2)), signals="random")["random"]["0"]
    assert scores.min() >= 0
    assert scores.max() < 1
    assert kstest(scores, "uniform").pvalue > 1e-3
