"""Normalisation layers: which are exact, and what goes together."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import secateur as sc
from tests.graph.tiny import Calls, identities, traced

IMAGE = (2, 3, 5, 5)


def around(norm: nn.Module) -> nn.Module:
    """`norm` over 6 channels between convolutions, and a layer more that can always be pruned."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 1), norm, nn.ReLU(), nn.Conv2d(6, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)
    )


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.InstanceNorm2d])
def test_channels_by_themselves(norm: type[nn.Module], affine: bool) -> None:
    graph = traced(around(norm(6, affine=affine, track_running_stats=True)), torch.randn(*IMAGE))
    assert (
        identities(graph, ("0.weight", 0, 6), ("1.running_mean", 0, 6), ("3.weight", 1, 6))
        == [[0, 1, 2, 3, 4, 5]] * 3
    )
    held = {s.tensor: s.role for s in graph["0"].slices if s.tensor.startswith("1.")}
    names = {"running_mean", "running_var"} | ({"weight", "bias"} if affine else set())
    assert held == {f"1.{name}": "scale" for name in names}


def test_batch_norm_of_vectors_and_of_statistics_that_are_not_kept() -> None:
    net = nn.Sequential(
        nn.Linear(3, 4),
        nn.BatchNorm1d(4),
        nn.Linear(4, 5),
        nn.BatchNorm1d(5, track_running_stats=False),
        nn.Linear(5, 2),
    )
    graph = traced(net, torch.randn(6, 3))
    assert identities(graph, ("0.weight", 0, 4), ("1.weight", 0, 4)) == [[0, 1, 2, 3]] * 2
    assert identities(graph, ("2.weight", 0, 5), ("3.weight", 0, 5)) == [[0, 1, 2, 3, 4]] * 2


@pytest.mark.parametrize("norm", [nn.LayerNorm(6), nn.LayerNorm(6, bias=False), nn.RMSNorm(6)])
def test_layer_norm_is_inexact(norm: nn.Module) -> None:
    net = nn.Sequential(nn.Linear(3, 6), norm, nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    graph = traced(net, torch.randn(2, 3))
    assert [g.name for g in graph.groups] == ["2"]
    (left,) = graph.left
    assert (left.group.name, left.group.size, left.group.exact) == ("0", 6, False)
    assert left.reason.startswith("mixed by aten.")
    assert left.group.inexact_because[0] in left.reason
    inexact = traced(net, torch.randn(2, 3), allow_inexact=True)
    assert (
        identities(inexact, ("0.weight", 0, 6), ("1.weight", 0, 6), ("2.weight", 1, 6))
        == [[0, 1, 2, 3, 4, 5]] * 3
    )


def test_layer_norm_over_maps() -> None:
    """The channels are mixed, and the axes of space stay."""
    graph = traced(around(nn.LayerNorm([6, 5, 5])), torch.randn(*IMAGE))
    assert [left.group.name for left in graph.left] == ["0"]
    assert identities(graph, ("1.weight", 1, 5), ("1.weight", 2, 5)) == [[-1] * 5] * 2


@pytest.mark.parametrize("affine", [True, False])
def test_group_norm_loses_whole_groups(affine: bool) -> None:
    graph = traced(around(nn.GroupNorm(3, 6, affine=affine)), torch.randn(*IMAGE))
    assert identities(graph, ("0.weight", 0, 6), ("3.weight", 1, 6)) == [[0, 0, 1, 1, 2, 2]] * 2


def test_group_norm_of_single_channels_is_exact() -> None:
    graph = traced(around(nn.GroupNorm(6, 6)), torch.randn(*IMAGE))
    assert identities(graph, ("0.weight", 0, 6), ("1.bias", 0, 6)) == [[0, 1, 2, 3, 4, 5]] * 2
    assert not graph.left


def test_group_norm_of_all_channels_is_inexact() -> None:
    graph = traced(around(nn.GroupNorm(1, 6)), torch.randn(*IMAGE))
    assert [left.group.name for left in graph.left] == ["0"]


def test_group_norm_across_what_its_input_ties_is_inexact() -> None:
    """The grouped convolution ties channel i to i + 3: every group of the norm loses the same."""
    net = nn.Sequential(
        nn.Conv2d(3, 6, 1),
        nn.Conv2d(6, 6, 1, groups=2),
        nn.GroupNorm(2, 6),
        nn.Conv2d(6, 4, 1),
        nn.Conv2d(4, 2, 1),
    )
    graph = traced(net, torch.randn(*IMAGE))
    left = {entry.group.name: entry.reason for entry in graph.left}
    assert "aten.group_norm.default" in left["1"]
    inexact = traced(net, torch.randn(*IMAGE), allow_inexact=True)
    assert identities(inexact, ("1.weight", 0, 6), ("2.weight", 0, 6)) == [[0, 1, 2, 0, 1, 2]] * 2


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.softmax(x, 1),
        lambda x: F.log_softmax(x, -1),
        lambda x: x - x.logsumexp(1, keepdim=True),
        lambda x: F.normalize(x, dim=1),
        lambda x: x / x.norm(dim=1, keepdim=True),
    ],
)
def test_over_the_units_they_mix(function: object) -> None:
    net = Calls(
        lambda m, x: m.c(F.relu(m.b(function(m.a(x))))),
        a=nn.Linear(3, 4),
        b=nn.Linear(4, 5),
        c=nn.Linear(5, 2),
    )
    graph = traced(net, torch.randn(2, 3))
    assert [left.group.name for left in graph.left] == ["a"]
    assert [g.name for g in graph.groups] == ["b"]


def test_over_other_axes_they_do_not() -> None:
    net = Calls(
        lambda m, x: m.b(F.normalize(F.softmax(m.a(x), 1), dim=1)), a=nn.Linear(3, 4), b=nn.Linear(4, 2)
    )
    assert [g.name for g in traced(net, torch.randn(2, 5, 3)).groups] == ["a"]


def test_a_model_of_mixed_units_only_says_what_to_do() -> None:
    net = nn.Sequential(nn.Linear(3, 6), nn.LayerNorm(6), nn.Linear(6, 2))
    with pytest.raises(
        sc.NothingToPruneError, match=r"mixed by aten\.layer_norm\.default(.|\n)*allow_inexact=True"
    ):
        sc.trace(net, torch.randn(2, 3))
