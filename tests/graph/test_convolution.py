"""Convolutions: which channels of which weights go together."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.graph.tiny import identities, reasons, traced

IMAGE = (2, 3, 6, 6)


@pytest.mark.parametrize(
    ("layer", "rank"), [(nn.Conv1d, 1), (nn.Conv2d, 2), (nn.Conv3d, 3)], ids=["1d", "2d", "3d"]
)
def test_plain(layer: type[nn.Module], rank: int) -> None:
    net = nn.Sequential(layer(2, 4, 3, padding="same"), nn.ReLU(), layer(4, 2, 3, bias=False))
    graph = traced(net, torch.randn(2, 2, *[5] * rank))
    assert identities(
        graph, ("0.weight", 0, 4), ("0.bias", 0, 4), ("1.weight", 1, 4), ("2.weight", 1, 4)
    ) == [[0, 1, 2, 3], [0, 1, 2, 3], [-1] * 4, [0, 1, 2, 3]]
    roles = {(s.tensor, s.axis): s.role for s in graph["0"].slices}
    assert roles == {("0.weight", 0): "produce", ("0.bias", 0): "produce", ("2.weight", 1): "consume"}


@pytest.mark.parametrize(
    ("layer", "rank"),
    [(nn.ConvTranspose1d, 1), (nn.ConvTranspose2d, 2), (nn.ConvTranspose3d, 3)],
    ids=["1d", "2d", "3d"],
)
def test_transposed(layer: type[nn.Module], rank: int) -> None:
    net = nn.Sequential(layer(2, 4, 2), nn.ReLU(), layer(4, 2, 2, stride=2))
    graph = traced(net, torch.randn(2, 2, *[3] * rank))
    assert identities(graph, ("0.weight", 1, 4), ("0.bias", 0, 4), ("2.weight", 0, 4)) == [[0, 1, 2, 3]] * 3
    roles = {(s.tensor, s.axis): s.role for s in graph["0"].slices}
    assert roles[("0.weight", 1)] == "produce"
    assert roles[("2.weight", 0)] == "consume"


def test_without_a_batch_axis() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    graph = traced(net, torch.randn(3, 8, 8))
    assert [(g.name, g.size) for g in graph.groups] == [("0", 4)]


def test_depthwise_with_a_multiplier() -> None:
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 6, 3, groups=3), nn.Conv2d(6, 2, 1))
    graph = traced(net, torch.randn(*IMAGE))
    assert identities(
        graph, ("0.weight", 0, 3), ("1.weight", 0, 6), ("1.bias", 0, 6), ("2.weight", 1, 6)
    ) == [
        [0, 1, 2],
        *[[0, 0, 1, 1, 2, 2]] * 3,
    ]


def test_more_groups_than_channels_in_each_go_whole() -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 9, 3, groups=3), nn.Conv2d(9, 2, 1))
    graph = traced(net, torch.randn(*IMAGE))
    assert identities(
        graph, ("0.weight", 0, 6), ("1.weight", 0, 9), ("1.weight", 1, 2), ("2.weight", 1, 9)
    ) == [
        [0, 0, 1, 1, 2, 2],
        [0, 0, 0, 1, 1, 1, 2, 2, 2],
        [-1, -1],
        [0, 0, 0, 1, 1, 1, 2, 2, 2],
    ]
    assert "aten.conv2d.default: position inside a group that is removed whole" in reasons(graph)


def test_fewer_groups_than_channels_in_each_all_lose_the_same() -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 8, 3, groups=2), nn.Conv2d(8, 2, 1))
    graph = traced(net, torch.randn(*IMAGE))
    assert identities(
        graph, ("0.weight", 0, 6), ("1.weight", 1, 3), ("1.weight", 0, 8), ("2.weight", 1, 8)
    ) == [
        [0, 1, 2, 0, 1, 2],
        [0, 1, 2],
        [3, 4, 5, 6, 3, 4, 5, 6],
        [3, 4, 5, 6, 3, 4, 5, 6],
    ]


def test_what_the_input_follows_already_decides() -> None:
    """Alone, the second layer (2 groups of 2) would lose whole groups; the first one ties across them."""
    net = nn.Sequential(nn.Conv2d(6, 4, 1, groups=2), nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 2, 1))
    graph = traced(nn.Sequential(nn.Conv2d(3, 6, 1), *net), torch.randn(*IMAGE))
    assert identities(graph, ("1.weight", 0, 4), ("2.weight", 1, 2), ("2.weight", 0, 4)) == [
        [0, 1, 0, 1],
        [0, 1],
        [2, 3, 2, 3],
    ]


def test_transposed_grouped_both_ways() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 1),
        nn.ConvTranspose2d(8, 6, 2, groups=2),  # 4 inputs a group: all lose the same
        nn.ReLU(),
        nn.Conv2d(6, 6, 1),
        nn.ConvTranspose2d(6, 9, 2, groups=3),  # 2 inputs a group: groups go whole
        nn.Conv2d(9, 2, 1),
    )
    graph = traced(net, torch.randn(*IMAGE))
    assert identities(
        graph, ("0.weight", 0, 8), ("1.weight", 0, 8), ("1.weight", 1, 3), ("3.weight", 1, 6)
    ) == [
        [0, 1, 2, 3] * 2,
        [0, 1, 2, 3] * 2,
        [4, 5, 6],
        [4, 5, 6] * 2,
    ]
    assert identities(
        graph, ("3.weight", 0, 6), ("4.weight", 0, 6), ("4.weight", 1, 3), ("5.weight", 1, 9)
    ) == [
        [0, 0, 1, 1, 2, 2],
        [0, 0, 1, 1, 2, 2],
        [-1] * 3,
        [0, 0, 0, 1, 1, 1, 2, 2, 2],
    ]


def test_kernels_never_shrink() -> None:
    graph = traced(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)), torch.randn(*IMAGE))
    assert {s.axis for g in graph.groups for s in g.slices if s.tensor.endswith("weight")} <= {0, 1}
