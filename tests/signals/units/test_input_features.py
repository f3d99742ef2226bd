"""FLAP's and Wanda's signals against their formulas, by plain loops over what the reading layers read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import secateur as sc


def fluctuation(x: list[float], w: list[float]) -> float:
    """Of one input feature: its sample variance times the squared norm of its weights."""
    mean = sum(x) / len(x)
    return sum((v - mean) ** 2 for v in x) / (len(x) - 1) * sum(v * v for v in w)


def wanda(x: list[float], w: list[float]) -> float:
    """Of one input feature: its root mean square times each absolute weight."""
    return sum(abs(v) * (sum(u * u for u in x) / len(x)) ** 0.5 for v in w)


FORMULAS = {"fluctuation": fluctuation, "wanda": wanda}


def of_linear(x: Tensor, layer: nn.Linear, formula: Callable[..., float]) -> list[float]:
    """Worth of each input of a linear layer. x: [samples, ..., in]"""
    rows = x.reshape(-1, x.shape[-1])
    return [formula(rows[:, j].tolist(), layer.weight[:, j].tolist()) for j in range(rows.shape[1])]


def of_conv(x: Tensor, layer: nn.Conv2d, formula: Callable[..., float]) -> list[float]:
    """Worth of each input channel of a plain 3 x 3 convolution, padded by 1, with stride 2."""
    padded = nn.functional.pad(x, (1, 1, 1, 1))
    found = []
    for channel in range(x.shape[1]):
        total = 0.0
        for i in range(3):
            for j in range(3):
                read = [
                    float(padded[s, channel, 2 * row + i, 2 * column + j])
                    for s in range(len(x))
                    for row in range((padded.shape[2] - 3) // 2 + 1)
                    for column in range((padded.shape[3] - 3) // 2 + 1)
                ]
                total += formula(read, layer.weight[:, channel, i, j].tolist())
        found.append(total)
    return found


def scored(net: nn.Module, data: list[Tensor], signal: str) -> Any:
    return sc.score(sc.trace(net, data[0]), data, signal, progress=False)[signal]


@pytest.mark.parametrize("signal", FORMULAS)
def test_linear_layers_and_tokens(signal: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    data = [torch.randn(n, 5, 4, dtype=torch.float64) for n in (3, 2)]
    with torch.no_grad():
        hidden = net[:2](torch.cat(data))
    expected = of_linear(hidden, net[2], FORMULAS[signal])
    np.testing.assert_allclose(scored(net, data, signal)["0"], expected, rtol=1e-10)


@pytest.mark.parametrize("signal", FORMULAS)
def test_convolutions_and_what_lies_flattened(signal: str) -> None:
    """The first group is read by a convolution, the second by a linear layer, in four columns a unit."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 3, 1), nn.Tanh(), nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.Flatten(), nn.Linear(16, 3)
    ).double()
    data = [torch.randn(n, 2, 4, 4, dtype=torch.float64) for n in (3, 2)]
    found = scored(net, data, signal)
    with torch.no_grad():
        hidden, flat = net[:2](torch.cat(data)), net[:4](torch.cat(data))
    np.testing.assert_allclose(found["0"], of_conv(hidden, net[2], FORMULAS[signal]), rtol=1e-10)
    columns = np.reshape(of_linear(flat, net[4], FORMULAS[signal]), (4, 4))
    np.testing.assert_allclose(found["2"], columns.sum(1), rtol=1e-10)


class TwoReaders(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.one, self.other = nn.Linear(3, 5), nn.Linear(5, 2), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return torch.cat([self.one(hidden.sin()), self.other(hidden.cos())], 1)


@pytest.mark.parametrize("signal", FORMULAS)
def test_readers_of_one_unit_add_up(signal: str) -> None:
    torch.manual_seed(0)
    net, data = TwoReaders().double(), [torch.randn(9, 3, dtype=torch.float64)]
    with torch.no_grad():
        hidden = net.first(data[0])
    formula = FORMULAS[signal]
    expected = np.add(of_linear(hidden.sin(), net.one, formula), of_linear(hidden.cos(), net.other, formula))
    np.testing.assert_allclose(scored(net, data, signal)["first"], expected, rtol=1e-10)


class Recurrent(nn.Module):
    """The hidden units are read by a recurrent layer alone, which is no regression."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.lstm = nn.Linear(3, 5), nn.LSTM(5, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(self.first(x))[0]


@pytest.mark.parametrize("signal", FORMULAS)
def test_without_a_layer_that_reads_them_the_units_show_for_themselves(signal: str) -> None:
    torch.manual_seed(0)
    net, data = Recurrent().double(), [torch.randn(4, 6, 3, dtype=torch.float64)]
    with torch.no_grad():
        rows = net.first(data[0]).reshape(-1, 5)
    expected = [FORMULAS[signal](rows[:, j].tolist(), [1.0]) for j in range(5)]
    np.testing.assert_allclose(scored(net, data, signal)["first"], expected, rtol=1e-10)


def test_wanda_sums_what_the_criterion_of_this_name_gives_single_weights() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 1), nn.Flatten(), nn.Linear(16, 3))
    data = [torch.randn(6, 2, 4, 4)]
    weights = sc.trace(net, granularity="weight")
    single = sc.score(weights, data, "wanda", progress=False)["wanda"]
    by_weight = next(v for name, v in single.items() if name.startswith("2")).reshape(4, 5)
    np.testing.assert_allclose(scored(net, data, "wanda")["0"], by_weight.sum(0), rtol=1e-5)


def test_flap_removes_what_a_bias_makes_up_for() -> None:
    """One unit is large and constant: FLAP removes it, and `bias` brings the outputs back."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).eval()
    with torch.no_grad():
        net[0].weight[2], net[0].bias[2] = 0.0, 9.0
    data = [torch.randn(20, 3) for _ in range(5)]
    graph = sc.trace(net, data[0])
    scores = sc.score(graph, data, ("fluctuation", "wanda"), progress=False)
    assert int(scores["wanda"]["0"].argmax()) == 2
    plan = sc.Global(0.25, "zscore", "fluctuation").allocate(graph, scores)
    assert plan.groups[0].removed == (2,)
    small = sc.repair(sc.apply(net, plan), net, data, "bias", progress=False)
    torch.testing.assert_close(small(data[0]), net(data[0]), rtol=1e-4, atol=1e-5)


def test_bias_is_flaps_compensation_where_the_kept_inputs_are_as_they_were() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2)).double().eval()
    data = [torch.randn(20, 3, dtype=torch.float64) for _ in range(5)]
    graph = sc.trace(net, data[0])
    plan = sc.Global(0.5, "zscore", "fluctuation").allocate(
        graph, sc.score(graph, data, "fluctuation", progress=False)
    )
    small = sc.repair(sc.apply(net, plan), net, data, "bias", progress=False)
    gone = list(plan.groups[0].removed)
    with torch.no_grad():
        baseline = net[:2](torch.cat(data[:4]))[:, gone].mean(0)  # the last fifth judges
        compensation = net[2].weight[:, gone] @ baseline
    torch.testing.assert_close(small[2].bias.detach(), net[2].bias.detach() + compensation)
