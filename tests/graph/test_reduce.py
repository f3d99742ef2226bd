"""Reductions, pooling and resampling."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.graph.tiny import Calls, identities, reasons, traced


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.mean((2, 3)),
        lambda x: x.sum((-1, -2)),
        lambda x: x.amax((2, 3)),
        lambda x: x.amin(2).amax(2),
        lambda x: x.max(2).values.max(-1)[0],
        lambda x: x.var((2, 3)) + x.std((2, 3)),
        lambda x: torch.var_mean(x, (2, 3))[0],
        lambda x: x.mean((2, 3), keepdim=True).flatten(1),
        lambda x: x.prod(3).prod(2),
    ],
    ids="mean sum amax amin max var var_mean keepdim prod".split(),
)
def test_over_space_channels_pass(function: object) -> None:
    net = Calls(lambda m, x: m.b(function(m.a(x))), a=nn.Conv2d(3, 4, 1), b=nn.Linear(4, 2))
    graph = traced(net, torch.randn(2, 3, 3, 3))
    assert identities(graph, ("a.weight", 0, 4), ("b.weight", 1, 4)) == [[0, 1, 2, 3]] * 2
    assert not graph.left


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x - x.mean(1, keepdim=True),
        lambda x: x * x.sum(),
        lambda x: x + x.argmax(1, keepdim=True),
        lambda x: x - x.amax((1, 2, 3), keepdim=True),
    ],
    ids="mean sum argmax amax".split(),
)
def test_over_channels_they_mix(function: object) -> None:
    net = Calls(
        lambda m, x: m.c(F.relu(m.b(function(m.a(x))))),
        a=nn.Conv2d(3, 4, 1),
        b=nn.Conv2d(4, 5, 1),
        c=nn.Conv2d(5, 2, 1),
    )
    graph = traced(net, torch.randn(2, 3, 3, 3))
    assert [left.group.name for left in graph.left] == ["a"]
    assert graph.left[0].reason.startswith("mixed by aten.")
    assert [g.name for g in graph.groups] == ["b"]


@pytest.mark.parametrize(
    "layer",
    [
        nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(2), nn.AdaptiveMaxPool2d((2, 1)),
        nn.Upsample(scale_factor=2), nn.Upsample(size=(3, 5), mode="bilinear"),
        nn.Upsample(scale_factor=2, mode="bicubic"), nn.ReflectionPad2d(1), nn.ReplicationPad2d(1),
        nn.ZeroPad2d(1), nn.ConstantPad2d(1, 3.0), nn.CircularPad2d(1), nn.LPPool2d(2, 2),
        nn.MaxPool2d(2, return_indices=True),
    ],
    ids=lambda layer: type(layer).__name__,
)  # fmt: skip
def test_resampling_leaves_channels_alone(layer: nn.Module) -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = m.layer(m.a(x))
        return m.b(y[0] if isinstance(y, tuple) else y)

    net = Calls(forward, a=nn.Conv2d(3, 4, 1), layer=layer, b=nn.Conv2d(4, 2, 1))
    graph = traced(net, torch.rand(2, 3, 4, 4))
    assert identities(graph, ("a.weight", 0, 4), ("b.weight", 1, 4)) == [[0, 1, 2, 3]] * 2


@pytest.mark.parametrize(
    ("pool", "conv", "space"),
    [
        (nn.MaxPool1d(2), nn.Conv1d, (8,)),
        (nn.AvgPool1d(2), nn.Conv1d, (8,)),
        (nn.MaxPool3d(2), nn.Conv3d, (4, 4, 4)),
        (nn.AdaptiveAvgPool3d(1), nn.Conv3d, (4, 4, 4)),
        (nn.AdaptiveMaxPool1d(2), nn.Conv1d, (8,)),
    ],
)
def test_other_ranks(pool: nn.Module, conv: type[nn.Module], space: tuple[int, ...]) -> None:
    graph = traced(nn.Sequential(conv(2, 4, 1), pool, conv(4, 2, 1)), torch.randn(2, 2, *space))
    assert [(g.name, g.size) for g in graph.groups] == [("0", 4)]


def test_units_along_a_resampled_axis_stay() -> None:
    """Pooling over the features of a linear layer needs its neighbours."""
    net = Calls(
        lambda m, x: m.c(m.b(F.avg_pool1d(m.a(x)[:, None], 2)[:, 0])),
        a=nn.Linear(3, 8),
        b=nn.Linear(4, 5),
        c=nn.Linear(5, 2),
    )
    graph = traced(net, torch.randn(2, 3))
    assert [g.name for g in graph.groups] == ["b"]
    assert any("needs its neighbours" in reason for reason in reasons(graph))


def test_channels_under_a_local_response_norm_stay_and_the_others_go() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.LocalResponseNorm(3), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 2, 1))
    graph = traced(net, torch.randn(2, 3, 5, 5))
    assert [g.name for g in graph.groups] == ["2"]
    assert any("needs its neighbours" in reason for reason in reasons(graph))
