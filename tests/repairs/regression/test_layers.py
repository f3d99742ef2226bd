"""Layers as regressions: columns times matrix is what the layer computes, for every kind."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.repairs.pairs import Pair
from secateur.repairs.regression.layers import Site
from secateur.repairs.tasks import tasks_of
from tests.targets.units.plans import plan_of


class Matrices(nn.Module):
    """Products with parameters that are not layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.randn(6, 6)) for _ in range(3))
        self.offset = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.offset, torch.mm(torch.relu(x @ self.a), self.b), self.c)


LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(5, 4), (5,)),
    "linear on a sequence": (nn.Linear(5, 4, bias=False), (3, 5)),
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1), (4, 9)),
    "conv2d": (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0)), (4, 7, 6)),
    "dilated": (nn.Conv2d(4, 6, 3, dilation=(1, 2), padding=2), (4, 7, 8)),
    "same": (nn.Conv2d(4, 6, (4, 3), padding="same", dilation=(1, 2)), (4, 7, 8)),
    "valid": (nn.Conv2d(4, 6, 3, padding="valid"), (4, 7, 8)),
    "grouped": (nn.Conv2d(6, 4, 3, groups=2), (6, 5, 5)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4, bias=False), (4, 5, 5)),
    "conv3d": (nn.Conv3d(2, 3, (1, 2, 3), stride=(1, 2, 1), padding=(0, 1, 1)), (2, 3, 4, 5)),
    "transposed 1d": (nn.ConvTranspose1d(4, 3, 4, stride=3, padding=1, output_padding=2), (4, 5)),
    "transposed 2d": (
        nn.ConvTranspose2d(4, 3, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)),
        (4, 5, 6),
    ),
    "transposed grouped": (nn.ConvTranspose2d(6, 4, 3, stride=2, groups=2), (6, 4, 3)),
    "transposed depthwise": (nn.ConvTranspose2d(4, 4, 2, groups=4), (4, 4, 3)),
    "transposed 3d": (nn.ConvTranspose3d(2, 3, 2, stride=2), (2, 2, 3, 2)),
    "matrices": (Matrices(), (6,)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_columns_times_matrix_is_the_output(name: str) -> None:
    layer, shape = LAYERS[name]
    generator = torch.Generator().manual_seed(1)
    net = nn.Sequential(nn.Tanh(), layer, nn.Tanh()).double()
    x = torch.randn(5, *shape, generator=generator, dtype=torch.float64)
    # Some group has to exist, so that there is something to trace.
    whole = nn.Sequential(nn.Linear(shape[-1], shape[-1]), nn.Linear(shape[-1], shape[-1]), net).double()
    graph = sc.trace(whole, x[:2])
    small = sc.apply(whole, plan_of(graph, {}), graph=graph)
    pair = Pair(graph, small)
    sites = [s for s in (Site.of(node, pair.planned[node], pair) for node in pair.nodes) if s is not None][2:]
    assert len(sites) == (3 if name == "matrices" else 1)
    values = pair.start(next(iter(sc.Calibration.of([(x,)]))))
    for site in sites:
        pair.advance(values, pair.index[site.node])
        call, weight = pair.planned[site.node], pair.tensor(site.weight)
        columns = site.layer.columns(pair.small_value(site.x, values), weight, call)
        matrix = site.layer.matrix(weight, call)
        wanted = site.layer.targets(pair.dense_value(site.node, values), weight, call)
        got = columns @ matrix
        if site.bias is not None:
            got = got + pair.tensor(site.bias).reshape(len(got), 1, -1)
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
        assert torch.equal(site.layer.unmatrix(matrix, weight, call), weight)
        assert site.layer.outputs(weight, call) == wanted.shape[0] * wanted.shape[2]


class Odd(nn.Module):
    """Weights that cannot be set: computed, scaled, no matrix; and a map without a batch axis."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.stack = nn.Parameter(torch.randn(3, 4, 4))
        self.offset = nn.Parameter(torch.randn(4))
        self.kernel = nn.Parameter(torch.randn(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.nn.functional.linear(self.second(self.first(x)), self.first.weight * 2)
        x = torch.addmm(self.offset, x, self.stack[0], alpha=2)
        x = (x[None] @ self.stack).sum(0)
        return torch.nn.functional.conv1d(x[:, 0][None], self.kernel)


def test_what_is_no_layer_whose_weight_can_be_set() -> None:
    net = Odd().double()
    x = torch.randn(5, 4, dtype=torch.float64)
    graph = sc.trace(net, x)
    pair = Pair(graph, sc.apply(net, plan_of(graph, {}), graph=graph))
    found = [s for s in (Site.of(node, pair.planned[node], pair) for node in pair.nodes) if s is not None]
    assert [pair.names[s.weight] for s in found] == ["first.weight", "second.weight"]
    assert [pair.names[t.weight] for t in tasks_of(pair)] == [
        "second.weight"
    ]  # the other is read doubled too
