"""FLAP's bias compensation, as the benchmark has it."""

from __future__ import annotations

import torch
from torch import nn

import secateur as sc
from benchmarks.flap import compensated, mean_inputs


def test_a_layer_gets_the_mean_output_of_the_inputs_that_it_lost() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 5, bias=False), nn.Tanh(), nn.Linear(5, 2)
    ).eval()
    data = [torch.randn(8, 3) for _ in range(4)]
    graph = sc.trace(net, data[0])
    scores = sc.score(graph, data, "fluctuation", progress=False)
    plan = sc.Global(0.4, "zscore", "fluctuation").allocate(graph, scores)
    first, second = ([*group.removed] for group in plan.groups)
    assert first
    assert second
    small = compensated(sc.apply(net, plan), net, graph, plan, mean_inputs(net, graph, data))
    with torch.no_grad():
        x = torch.cat(data)
        lost = net[:2](x)[:, first].mean(0) @ net[2].weight[:, first].t()
        kept = [k for k in range(5) if k not in second]
        torch.testing.assert_close(small[2].bias, lost[kept])
        lost = net[:4](x)[:, second].mean(0) @ net[4].weight[:, second].t()
        torch.testing.assert_close(small[4].bias, net[4].bias + lost)
