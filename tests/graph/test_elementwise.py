"""Operators that act on each position by itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.graph.tiny import Calls, between, identities, reasons, traced

ACTIVATIONS = (
    "relu relu6 gelu silu mish tanh sigmoid softplus softsign hardswish hardsigmoid hardtanh leaky_relu elu "
    "selu celu logsigmoid tanhshrink softshrink hardshrink"
).split()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name: str) -> None:
    assert between(3, 3, getattr(F, name)) == [[0, 1, 2], [0, 1, 2]]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.relu_().mul_(2.0),
        lambda x: x.clone().detach().contiguous(),
        lambda x: F.dropout(F.alpha_dropout(x, training=False), training=False),
        lambda x: torch.where(x > 0, x, 0.1 * x).clamp(-1, 1),
        lambda x: torch.nan_to_num(x.to(torch.float64)),
        lambda x: x + torch.zeros(x.shape[-1], dtype=x.dtype) * x.new_ones(1, 1),
        lambda x: torch.zeros_like(x).copy_(x),
        lambda x: x.masked_fill(x < 0, 0.0),
        lambda x: torch.maximum(x, -x) ** 2 / 3,
    ],
)
def test_others(function: Callable[[Tensor], Tensor]) -> None:
    assert between(3, 3, function) == [[0, 1, 2], [0, 1, 2]]


def test_operands_that_broadcast_are_tied() -> None:
    net = Calls(
        lambda m, x: m.b(m.a(x) * m.scale + m.c(x)[:, None].sum(1)),
        a=nn.Linear(3, 4), c=nn.Linear(3, 4), scale=nn.Parameter(torch.rand(1, 4)), b=nn.Linear(4, 2),
    )  # fmt: skip
    graph = traced(net, torch.randn(2, 3))
    axes = [("a.weight", 0, 4), ("c.weight", 0, 4), ("scale", 1, 4), ("b.weight", 1, 4)]
    assert identities(graph, *axes) == [[0, 1, 2, 3]] * 4
    assert {s.tensor: s.role for s in graph["a"].slices}["scale"] == "scale"


def test_the_larger_operand_decides_the_shape() -> None:
    """A column of one follows nothing; a row of units spreads over the batch."""
    net = Calls(
        lambda m, x: m.b(m.a(x) + m.offset + x[:, :1]),
        a=nn.Linear(3, 4), offset=nn.Parameter(torch.rand(4)), b=nn.Linear(4, 2),
    )  # fmt: skip
    graph = traced(net, torch.randn(5, 3))
    assert identities(graph, ("a.weight", 0, 4), ("offset", 0, 4)) == [[0, 1, 2, 3]] * 2


def test_prelu_has_a_slope_a_channel() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.PReLU(4), nn.Conv2d(4, 3, 1), nn.PReLU(), nn.Conv2d(3, 2, 1))
    graph = traced(net, torch.randn(2, 3, 4, 4))
    assert identities(graph, ("0.weight", 0, 4), ("1.weight", 0, 4), ("2.weight", 1, 4)) == [[0, 1, 2, 3]] * 3
    assert "3.weight" not in {s.tensor for g in graph.groups for s in g.slices}


def test_glu_ties_each_value_to_its_gate() -> None:
    assert between(6, 3, F.glu) == [[0, 1, 2, 0, 1, 2], [0, 1, 2]]
    assert between(6, 3, lambda x: F.glu(x.mT, dim=1).mT, 2, 4, 3) == [[0, 1, 2, 0, 1, 2], [0, 1, 2]]


def test_values_that_depend_on_the_position_freeze() -> None:
    net = Calls(
        lambda m, x: m.c(m.b(m.a(x) * torch.arange(4)).relu()),
        a=nn.Linear(3, 4), b=nn.Linear(4, 5), c=nn.Linear(5, 2),
    )  # fmt: skip
    graph = traced(net, torch.randn(2, 3))
    assert [(g.name, g.size) for g in graph.groups] == [("b", 5)]
    assert "aten.arange.default" in reasons(graph)


def test_a_running_sum_mixes() -> None:
    net = Calls(
        lambda m, x: m.c(m.b(m.a(x).cumsum(1))), a=nn.Linear(3, 4), b=nn.Linear(4, 5), c=nn.Linear(5, 2)
    )
    graph = traced(net, torch.randn(2, 3))
    assert [(left.group.name, left.group.exact) for left in graph.left] == [("a", False)]
    assert "aten.cumsum.default" in graph.left[0].reason


def test_writing_in_place_into_a_part() -> None:
    def write(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, 1:3] = 0.5
        x[:, :2] += x[:, 2:]
        return x.relu()

    assert between(4, 4, write) == [[0, 1, 0, 1], [0, 1, 0, 1]]
