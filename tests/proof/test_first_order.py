"""The first-order bound on the change of the loss, beside the change."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import secateur as sc
from secateur.errors import ScoreError
from secateur.proof.first_order import first_order_bound, loss_change


def network() -> tuple[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 3)).double()
    data = [(torch.randn(16, 5, dtype=torch.float64), torch.randint(3, (16,))) for _ in range(2)]
    return net, data


def test_the_bound_is_the_removed_scores_and_the_change_is_measured() -> None:
    net, data = network()
    graph = sc.trace(net, data[0][0])
    scores = sc.score(graph, data, "taylor", progress=False)
    plan = sc.Uniform(ratio=0.5, removal="taylor").allocate(graph, scores)
    small = sc.apply(net, plan, graph=graph)
    found = loss_change(net, small, data, scores["taylor"], plan.keep)
    # Literally: the mean loss over all samples, and one backward pass over all of them.
    x, y = torch.cat([a for a, _ in data]), torch.cat([b for _, b in data])
    copied = copy.deepcopy(net)
    loss = F.cross_entropy(copied(x), y)
    loss.backward()
    layer = copied[0]
    by_weight = ((layer.weight * layer.weight.grad).sum(1) + layer.bias * layer.bias.grad).detach()
    removed = list(plan.groups[0].removed)
    assert found.bound == pytest.approx(float(by_weight.abs()[removed].sum()))
    assert found.before == pytest.approx(loss.item())
    with torch.no_grad():
        copied[0].weight[removed] = 0
        copied[0].bias[removed] = 0
        assert found.measured == pytest.approx(F.cross_entropy(copied(x), y).item() - loss.item())


def test_small_removals_stay_within_the_bound() -> None:
    """To first order: what removing the same unit, scaled towards zero, does is within the bound."""
    net, data = network()
    with torch.no_grad():  # tanh(0) = 0, so small producing weights are a small removal
        net[0].weight.mul_(1e-3)
        net[0].bias.mul_(1e-3)
    graph = sc.trace(net, data[0][0])
    scores = sc.score(graph, data, "taylor", progress=False)
    for ratio in (0.25, 0.5, 0.75):
        plan = sc.Uniform(ratio=ratio, removal="taylor").allocate(graph, scores)
        found = loss_change(net, sc.apply(net, plan, graph=graph), data, scores["taylor"], plan.keep)
        assert 0 < abs(found.measured) <= found.bound * 1.01


def test_scores_that_do_not_fit() -> None:
    with pytest.raises(ScoreError, match="expected a score for each unit of 'fc', got none"):
        first_order_bound({}, {"fc": np.ones(2, dtype=bool)})
    with pytest.raises(ScoreError, match=r"expected a score for each unit of 'fc', got \(3,\)"):
        first_order_bound({"fc": np.ones(3)}, {"fc": np.ones(2, dtype=bool)})
