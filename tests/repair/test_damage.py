"""The error that refitting leaves, against refitting for real."""

from __future__ import annotations

import importlib
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc
from secateur.repair.damage import damage
from tests.models import build
from tests.repair.nets import inputs, topology_data

MODULE = importlib.import_module("secateur.repair.damage")


def remaining(columns: Tensor, wanted: Tensor, keep: Tensor) -> float:
    """Sum of squares that the best weights on some columns, with an intercept, leave of the targets."""
    x = (columns - columns.mean(0))[:, keep].numpy()
    y = (wanted - wanted.mean(0)).numpy()
    return float(((y - x @ np.linalg.lstsq(x, y, rcond=None)[0]) ** 2).sum())


def literal(columns: Tensor, unit: Tensor, wanted: Tensor, scatter: float) -> np.ndarray:
    """Refit without each unit that is left, drop the one that costs least, and so on."""
    alive, value = list(range(int(unit.max()) + 1)), np.zeros(int(unit.max()) + 1)
    while alive:
        errors = {u: remaining(columns, wanted, torch.isin(unit, torch.tensor([a for a in alive if a != u])))
                  for u in alive}  # fmt: skip
        gone = min(errors, key=lambda u: errors[u])
        value[gone] = errors[gone] / scatter
        alive.remove(gone)
    return value


def test_linear_layers_and_a_residual_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "DAMPING", 1e-12)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    data = inputs(5, batches=3, samples=20)
    x = torch.cat([b[0] for b in data])
    graph = sc.trace(net, data[0][0])
    with torch.no_grad():
        hidden, out = net[:2](x), net(x)
    scatter = float((out - out.mean(0)).square().sum())
    found = damage(net, graph, sc.Calibration.of(data))
    np.testing.assert_allclose(found["0"], literal(hidden, torch.arange(7), out, scatter), rtol=1e-5)


class Block(nn.Module):
    """x + norm(conv(tanh(conv(x))))."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 3, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(3)
        self.norm.running_var.uniform_(0.1, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x.sin() + self.norm(self.outer(torch.tanh(self.inner(x))))


def test_the_error_is_relative_to_the_sum_that_it_goes_into(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "DAMPING", 1e-12)
    torch.manual_seed(0)
    net = Block().double().eval()
    data = inputs(3, 5, 5, batches=3, samples=8)
    x = torch.cat([b[0] for b in data])
    graph = sc.trace(net, data[0][0])
    with torch.no_grad():
        hidden = torch.tanh(net.inner(x))
        into = net.norm(net.outer(hidden))
        whole = net(x)
    columns = F.unfold(hidden, 3, padding=1).transpose(1, 2).flatten(0, 1)
    scatter = float((whole - whole.mean((0, 2, 3), keepdim=True)).square().sum())
    wanted = into.movedim(1, -1).flatten(0, 2)
    value = literal(columns, torch.arange(45) // 9, wanted, scatter)
    (found,) = damage(net, graph, sc.Calibration.of(data)).values()
    np.testing.assert_allclose(found, value, rtol=1e-5)


@pytest.mark.parametrize("name", ["unet", "grouped", "flatten_to_linear", "gated", "shared_input", "lstm"])
def test_every_unit_of_every_group_that_layers_consume_has_a_value(name: str) -> None:
    net = build(name)
    data = topology_data(name, batches=2)
    first = data[0] if isinstance(data[0], dict) else data[0][0]
    graph = sc.trace(net, first)
    found = damage(net, graph, sc.Calibration.of(data))
    assert found
    sizes = {g.name: g.size for g in graph.groups}
    for group, values in found.items():
        assert values.shape == (sizes[group],)
        assert np.isfinite(values).all()
        assert (values >= 0).all()
    again = damage(net, graph, sc.Calibration.of(data))
    assert all(np.array_equal(found[k], again[k]) for k in found)


def test_what_others_can_replace_goes_first_also_in_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4)).double()
    with torch.no_grad():
        net[0].weight[6:] = net[0].weight[:2] + net[0].weight[2:4]
        net[0].bias[6:] = 0
    data = inputs(6, batches=2, samples=40)
    graph = sc.trace(net, data[0][0])
    found = damage(net, graph, sc.Calibration.of(data))["0"]
    order = np.argsort(found, kind="stable")
    assert found[order[1]] < 0.05 * found[order[2]]
    assert all(a <= b for a, b in pairwise(found[order]))
    monkeypatch.setattr(MODULE, "STEPS", 4)
    stepped = damage(net, graph, sc.Calibration.of(data))["0"]  # two at a time
    assert set(np.argsort(stepped)[:1]) == set(order[:1])
