"""Views: which positions stay together when axes merge, split and move."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc
from tests.graph.tiny import Calls, between, identities, reasons, traced

FOUR = [0, 1, 2, 3]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.view(-1, 4),
        lambda x: x.reshape(x.shape[0], 2, 2).flatten(1).relu(),
        lambda x: x.unsqueeze(1).squeeze(1),
        lambda x: x[:, None, :, None].squeeze(),
        lambda x: x.unsqueeze(-1).transpose(1, 2).squeeze((1,)),
        lambda x: x.t().t(),
        lambda x: x.permute(1, 0).movedim(1, 0),
        lambda x: x.expand(2, -1, -1)[0],
        lambda x: x.view(x.shape[0], 1, 4).expand(-1, 3, -1).amax(1),
    ],
)  # fmt: skip
def test_axes_that_stay_keep_their_units(function: Callable[[Tensor], Tensor]) -> None:
    a, b = between(4, 4, function)
    assert a == b
    assert a in (FOUR, [0, 0, 1, 1], [0, 1, 0, 1])


def test_a_map_that_is_flattened_repeats_its_channels() -> None:
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Flatten(), nn.Linear(12, 2))
    graph = traced(net, torch.randn(2, 3, 2, 2))
    assert identities(graph, ("0.weight", 0, 3), ("2.weight", 1, 12)) == [
        [0, 1, 2],
        [0] * 4 + [1] * 4 + [2] * 4,
    ]


def test_channels_last_and_flattened_tile() -> None:
    net = Calls(
        lambda m, x: m.b(m.a(x).permute(0, 2, 3, 1).flatten(1)), a=nn.Conv2d(3, 3, 1), b=nn.Linear(12, 2)
    )
    graph = traced(net, torch.randn(2, 3, 2, 2))
    assert identities(graph, ("a.weight", 0, 3), ("b.weight", 1, 12)) == [[0, 1, 2], [0, 1, 2] * 4]


def test_a_batch_that_is_merged_in_passes_units_on() -> None:
    net = Calls(
        lambda m, x: m.b(m.a(x).flatten(0, 1)).view(x.shape[0], -1, 2), a=nn.Linear(3, 4), b=nn.Linear(4, 2)
    )
    assert identities(traced(net, torch.randn(2, 5, 3)), ("a.weight", 0, 4), ("b.weight", 1, 4)) == [FOUR] * 2


def test_channels_merged_with_the_batch() -> None:
    """Each channel becomes an image of its own, goes through one layer, and comes back."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = F.relu(m.a(x))
        each = m.same(y.view(-1, 1, *y.shape[2:]))
        return m.b(each.view(x.shape[0], 4, *each.shape[2:]).mean((2, 3)))

    net = Calls(forward, a=nn.Conv2d(3, 4, 1), same=nn.Conv2d(1, 1, 3), b=nn.Linear(4, 2))
    graph = traced(net, torch.randn(2, 3, 5, 5))
    assert identities(graph, ("a.weight", 0, 4), ("b.weight", 1, 4)) == [FOUR] * 2


def split(sizes: tuple[int, ...], then: Callable[[Tensor], Tensor]) -> list[list[int]]:
    return between(6, 6, lambda x: then(x.unflatten(1, sizes)).flatten(1))


def test_a_split_axis_is_carried_by_the_larger_one() -> None:
    assert split((2, 3), F.relu) == [[0, 1, 2, 0, 1, 2]] * 2
    assert split((3, 2), F.relu) == [[0, 0, 1, 1, 2, 2]] * 2


def test_a_split_axis_is_carried_by_the_one_that_is_not_needed_whole() -> None:
    assert split((2, 3), lambda x: F.softmax(x, 2)) == [[0, 0, 0, 1, 1, 1]] * 2
    assert split((3, 2), lambda x: F.softmax(x, 1)) == [[0, 1, 0, 1, 0, 1]] * 2


def test_a_shuffle() -> None:
    a, b = split((3, 2), lambda x: x.transpose(1, 2))
    assert a == [0, 0, 1, 1, 2, 2]
    assert b == [0, 1, 2, 0, 1, 2]


def test_what_was_merged_splits_without_ties() -> None:
    """Labels that vary along one of the axes only say which one carries."""
    net = Calls(
        lambda m, x: m.b(F.relu(m.a(x)).flatten(1).view(x.shape[0], 3, 2, 2).mean((2, 3))),
        a=nn.Conv2d(3, 3, 1),
        b=nn.Linear(3, 2),
    )
    graph = traced(net, torch.randn(2, 3, 2, 2))
    assert identities(graph, ("a.weight", 0, 3), ("b.weight", 1, 3)) == [[0, 1, 2]] * 2


def test_two_axes_of_units_that_merge_leave_one() -> None:
    """The outer product of two vectors of units: one of them is needed whole."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        outer = m.a(x)[:, :, None] * m.b(x)[:, None, :]
        return m.c(outer.flatten(1))

    net = Calls(forward, a=nn.Linear(3, 3), b=nn.Linear(3, 2), c=nn.Linear(6, 2))
    graph = traced(net, torch.randn(2, 3))
    assert identities(graph, ("a.weight", 0, 3), ("b.weight", 0, 2), ("c.weight", 1, 6)) == [
        [0, 1, 2],
        [-1, -1],
        [0, 0, 1, 1, 2, 2],
    ]
    assert any("merged into one axis with another that holds units" in r for r in reasons(graph))


def test_copies_follow_what_they_are_combined_with() -> None:
    """A single gate for all units, expanded or repeated over them."""
    for spread in (
        lambda g, y: g.expand_as(y),
        lambda g, y: g.repeat(1, 4),
        lambda g, y: g.broadcast_to(y.shape),
    ):
        net = Calls(
            lambda m, x, spread=spread: m.b(m.a(x) * spread(m.gate(x).sigmoid(), m.a(x))),
            a=nn.Linear(3, 4), gate=nn.Linear(3, 1), b=nn.Linear(4, 2),
        )  # fmt: skip
        graph = traced(net, torch.randn(2, 3))
        assert identities(graph, ("a.weight", 0, 4), ("b.weight", 1, 4)) == [FOUR] * 2


@pytest.mark.parametrize(
    ("function", "b"),
    [
        (lambda x: x.repeat(1, 2), [0, 1, 2, 0, 1, 2]),
        (lambda x: x.tile(2), [0, 1, 2, 0, 1, 2]),
        (lambda x: x.repeat_interleave(2, 1), [0, 0, 1, 1, 2, 2]),
        (lambda x: x[:, :, None].expand(-1, -1, 2).flatten(1), [0, 0, 1, 1, 2, 2]),
        (lambda x: x[:, None].expand(-1, 2, -1).reshape(x.shape[0], -1), [0, 1, 2, 0, 1, 2]),
    ],
)
def test_each_copy_of_a_unit_is_that_unit(function: Callable[[Tensor], Tensor], b: list[int]) -> None:
    assert between(3, 6, function) == [[0, 1, 2], b]


def test_pixels_and_channels() -> None:
    a = [0] * 4 + [1] * 4 + [2] * 4
    net = nn.Sequential(nn.Conv2d(3, 12, 1), nn.PixelShuffle(2), nn.Conv2d(3, 2, 1))
    assert identities(traced(net, torch.randn(2, 3, 4, 4)), ("0.weight", 0, 12), ("2.weight", 1, 3)) == [
        a,
        [0, 1, 2],
    ]
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.PixelUnshuffle(2), nn.Conv2d(12, 2, 1))
    assert identities(traced(net, torch.randn(2, 3, 4, 4)), ("0.weight", 0, 3), ("2.weight", 1, 12)) == [
        [0, 1, 2],
        a,
    ]
    net = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ChannelShuffle(2), nn.Conv2d(6, 2, 1))
    assert identities(traced(net, torch.randn(2, 3, 4, 4)), ("0.weight", 0, 6), ("2.weight", 1, 6)) == [
        [0, 1, 2, 0, 1, 2],
        [0, 0, 1, 1, 2, 2],
    ]


def test_squeezing_an_axis_that_becomes_a_single_unit() -> None:
    """With one of the two units gone, the squeeze must not take the axis away."""
    assert between(2, 2, lambda x: x.squeeze(1)) == [[0, 1], [0, 1]]
    assert between(2, 2, lambda x: x[..., None].squeeze((1, 2)).squeeze()) == [[0, 1], [0, 1]]


def test_unfold_repeats_a_channel_for_each_position_of_the_window() -> None:
    def joined(m: nn.Module, x: Tensor) -> Tensor:
        patches = F.unfold(m.a(x), (2, 3))
        return m.b(F.fold(patches * m.scale[:, None], (5, 6), (2, 3)))

    net = Calls(joined, a=nn.Conv2d(2, 4, 1), b=nn.Conv2d(4, 2, 1), scale=nn.Parameter(torch.randn(24)))
    graph = traced(net, torch.randn(2, 2, 5, 6))
    each = [unit for unit in FOUR for _ in range(6)]
    axes = [("a.weight", 0, 4), ("b.weight", 1, 4), ("scale", 0, 24)]
    assert identities(graph, *axes) == [FOUR, FOUR, each]


def test_heads_merged_with_an_open_batch_axis_before_an_axis_without_a_stated_size() -> None:
    def attention(m: nn.Module, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (
            t.reshape(b, n, 3, 2).transpose(1, 2).reshape(b * 3, n, -1) for t in (m.q(x), m.k(x), m.v(x))
        )
        y = torch.softmax(q @ k.transpose(1, 2), -1) @ v
        return m.out(y.reshape(b, 3, n, 2).transpose(1, 2).reshape(b, n, -1))

    parts = {name: nn.Linear(4, 6) for name in "qkv"}
    graph = traced(Calls(attention, **parts, out=nn.Linear(6, 2)), torch.randn(3, 5, 4))
    assert [group.size for group in graph.groups] == [3]


@pytest.mark.parametrize("made", ["of zeros", "of the input"])
def test_heads_behind_a_mask_of_numbers(made: str) -> None:
    """Samples and heads become one axis of the mask. Samples of a mask that forward fills hold no units."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(9, 16)
            self.attention, self.out = nn.MultiheadAttention(16, 4, batch_first=True), nn.Linear(16, 3)

        def forward(self, ids: Tensor) -> Tensor:
            zeros = torch.zeros(ids.shape) if made == "of zeros" else torch.zeros_like(ids, dtype=torch.float)
            h, mask = self.words(ids), zeros.masked_fill(ids == 0, float("-inf"))
            return self.out(self.attention(h, h, h, key_padding_mask=mask, need_weights=False)[0])

    ids = torch.tensor([[1, 2, 3, 4, 0], [5, 6, 0, 0, 0]])
    graph = sc.trace(Encoder().eval(), ids)
    assert {g.name: g.size for g in graph.groups}["attention"] == 4
