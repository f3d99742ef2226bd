"""The error that refitting leaves, against refitting for real."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc
from secateur.repairs.regression import elimination
from secateur.signals.units import columns as moments
from secateur.signals.units import reconstruction
from secateur.signals.units.columns import Columns
from tests.helpers.models import build
from tests.repairs.nets import inputs, topology_data


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """The errors on the data themselves: nothing is damped, and covariances are not shrunk."""
    monkeypatch.setattr(elimination, "DAMPING", 1e-12)
    monkeypatch.setattr(moments, "shrunk", lambda covariance, error: covariance)


def scored(net: nn.Module, graph: sc.Graph, data: Any) -> dict[str, NDArray[np.float64]]:
    return dict(sc.score(graph, data, "reconstruction", progress=False)["reconstruction"])


def remaining(columns: Tensor, wanted: Tensor, keep: Tensor) -> float:
    """Sum of squares that the best weights on some columns, with an intercept, leave of the targets."""
    x = (columns - columns.mean(0))[:, keep].numpy()
    y = (wanted - wanted.mean(0)).numpy()
    return float(((y - x @ np.linalg.lstsq(x, y, rcond=None)[0]) ** 2).sum())


def literal(columns: Tensor, unit: Tensor, wanted: Tensor, scatter: float) -> NDArray[np.float64]:
    """Refit without each unit that is left, drop the one that costs least, and so on."""
    alive, value = list(range(int(unit.max()) + 1)), np.zeros(int(unit.max()) + 1)
    while alive:
        errors = {u: remaining(columns, wanted, torch.isin(unit, torch.tensor([a for a in alive if a != u])))
                  for u in alive}  # fmt: skip
        gone = min(errors, key=lambda u: errors[u])
        value[gone] = errors[gone] / scatter
        alive.remove(gone)
    return value


@pytest.mark.usefixtures("exact")
def test_linear_layers_against_refitting() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    data = inputs(5, batches=3, samples=20)
    x = torch.cat([b[0] for b in data])
    graph = sc.trace(net, data[0][0])
    with torch.no_grad():
        hidden, out = net[:2](x), net(x)
    scatter = float((out - out.mean(0)).square().sum())
    found = scored(net, graph, data)
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


@pytest.mark.usefixtures("exact")
def test_the_error_is_relative_to_the_sum_that_it_goes_into() -> None:
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
    (found,) = scored(net, graph, data).values()
    np.testing.assert_allclose(found, value, rtol=1e-5)


@pytest.mark.parametrize("name", ["unet", "grouped", "flatten_to_linear", "gated", "shared_input", "lstm"])
def test_every_unit_has_a_value(name: str) -> None:
    net = build(name)
    data = topology_data(name, batches=2)
    first = data[0] if isinstance(data[0], dict) else data[0][0]
    graph = sc.trace(net, first)
    found = scored(net, graph, data)
    for group in graph.groups:
        assert found[group.name].shape == (group.size,)
        assert (found[group.name] >= 0).all()
    again = scored(net, graph, data)
    assert all(np.array_equal(found[k], again[k]) for k in found)


def test_what_others_can_replace_goes_first_also_in_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "shrunk", lambda covariance, error: covariance)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4)).double()
    with torch.no_grad():
        net[0].weight[6:] = net[0].weight[:2] + net[0].weight[2:4]
        net[0].bias[6:] = 0
    data = inputs(6, batches=2, samples=40)
    graph = sc.trace(net, data[0][0])
    found = scored(net, graph, data)["0"]
    order = np.argsort(found, kind="stable")
    assert found[order[1]] < 0.05 * found[order[2]]
    assert all(a <= b for a, b in pairwise(found[order]))
    monkeypatch.setattr(elimination, "STEPS", 4)
    stepped = scored(net, graph, data)["0"]  # two at a time
    assert set(np.argsort(stepped)[:1]) == set(order[:1])


class Gate(nn.Module):
    """Two layers that nothing but a product reads."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 6), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return (self.a(x) * self.b(x)).sum(-1)


@pytest.mark.usefixtures("exact")
def test_what_no_layer_reads_is_to_be_told_by_what_stays() -> None:
    net = Gate().double()
    data = inputs(8, batches=3, samples=20)
    graph = sc.trace(net, data[0][0], allow_inexact=True)
    (group,) = graph.groups
    found = scored(net, graph, data)[group.name]
    alive, value = list(range(6)), np.zeros(6)
    x = torch.cat([b[0] for b in data])
    with torch.no_grad():
        sites = [net.get_submodule(site.producer.rsplit(".", 1)[0])(x) for site in group.sites]
    while alive:
        errors = {
            u: sum(
                remaining(y, y, torch.tensor([a for a in alive if a != u], dtype=torch.long))
                / float((y - y.mean(0)).square().sum())
                for y in sites
            )
            for u in alive
        }
        gone = min(errors, key=lambda u: errors[u])
        value[gone] = errors[gone]
        alive.remove(gone)
    np.testing.assert_allclose(found, value, rtol=1e-5, atol=1e-9)


def test_a_draw_of_positions_stands_for_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the positions give nearly the same scores, also where columns and ends count differently."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), Block2(), nn.AdaptiveAvgPool2d(1)).double()
    data = [(torch.rand(16, 3, 12, 12, dtype=torch.float64),) for _ in range(4)]
    graph = sc.trace(net, data[0][0])
    found = []
    for most in (10_000, 64):
        monkeypatch.setattr(reconstruction, "POSITIONS", most)
        found.append(scored(net, graph, data))
    assert found[0].keys() == found[1].keys()
    for group, every in found[0].items():
        assert not np.array_equal(found[1][group], every)
        np.testing.assert_allclose(np.sort(found[1][group]), np.sort(every), rtol=0.1)
    assert scored(net, graph, data).keys() == found[1].keys()
    for group, again in scored(net, graph, data).items():
        np.testing.assert_array_equal(again, found[1][group])


class Block2(nn.Module):
    """x + conv(relu(conv(x))), four channels."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(torch.relu(self.inner(x)))


def test_covariances_are_shrunk_as_far_as_samples_differ() -> None:
    """Against the literal sums over all entries and samples, which the random signs estimate."""
    torch.manual_seed(0)
    samples, positions, columns = 40, 6, 24
    mixed = torch.randn(columns, columns, dtype=torch.float64)
    of_sample = torch.randn(samples, 1, columns, dtype=torch.float64)  # what positions have in common
    x = (of_sample + 0.5 * torch.randn(samples, positions, columns, dtype=torch.float64)) @ mixed + 0.3
    sums = Columns(1, columns, x.device)
    for part in x.split(8):
        sums.add(part.reshape(1, -1, columns), len(part))
    products = x.transpose(1, 2) @ x / positions
    beside = ~torch.eye(columns, dtype=torch.bool)
    error = products.var(0)[beside].sum() / samples
    plain = torch.cov(x.reshape(-1, columns).t(), correction=0)
    share = error / plain[beside].square().sum()
    (found,) = sums.covariance()
    kept = found[beside] / plain[beside]
    torch.testing.assert_close(found.diagonal(), plain.diagonal())
    torch.testing.assert_close(kept, kept[:1].expand_as(kept))
    assert 0.1 < share < 0.9
    assert 1 - float(kept[0]) == pytest.approx(float(share), rel=0.25)


def test_how_samples_come_in_batches_does_not_matter_for_shrinking() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 30, 4, 5, dtype=torch.float64)
    found = []
    for size in (30, 7):
        sums = Columns(3, 5, x.device)
        for part in x.split(size, 1):
            sums.add(part.reshape(3, -1, 5), part.shape[1])
        found.append(sums.covariance())
    torch.testing.assert_close(*found)


def test_few_samples_do_not_make_wide_layers_look_replaceable() -> None:
    """16 samples, 64 units that have nothing to do with each other: any 15 would tell all others."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).double()
    graph = sc.trace(net, torch.zeros(2, 64, dtype=torch.float64))
    half = {}
    for samples in (16, 4000):
        found = scored(net, graph, [(x,) for x in torch.randn(samples, 64, dtype=torch.float64).split(8)])[
            "0"
        ]
        half[samples] = np.sort(found)[32]
    assert half[16] > 0.5 * half[4000] > 0.1


def test_views_of_a_sample_are_no_further_samples() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 30, 4, 5, dtype=torch.float64)
    found = []
    for views in (1, 3):
        sums = Columns(1, 5, x.device, views)
        for _ in range(views):  # of the plainest kind
            sums.add(x.reshape(1, -1, 5), 30)
        found.append(sums.covariance())
    torch.testing.assert_close(*found)
