"""Joining, cutting and choosing along an axis: which unit ends up where."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.graph.tiny import Calls, between, identities, reasons, traced

SIX = [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("out", "function", "b"),
    [
        (6, lambda x: torch.cat([x[:, 3:], x[:, :3]], 1), [3, 4, 5, 0, 1, 2]),
        (8, lambda x: torch.cat([x, x[:, 4:]], -1), [0, 1, 2, 3, 4, 5, 4, 5]),
        (6, lambda x: torch.cat(list(reversed(x.chunk(3, 1))), 1), [4, 5, 2, 3, 0, 1]),
        (6, lambda x: torch.cat(list(reversed(x.split(4, 1))), 1), [4, 5, 0, 1, 2, 3]),
        (6, lambda x: torch.cat(list(reversed(x.split([2, 4], 1))), 1), [2, 3, 4, 5, 0, 1]),
        (6, lambda x: torch.cat(list(reversed(x.tensor_split(3, 1))), 1), [4, 5, 2, 3, 0, 1]),
        (6, lambda x: torch.cat(list(reversed(x.tensor_split((2, 4), 1))), 1), [4, 5, 2, 3, 0, 1]),
        (3, lambda x: x[:, ::2], [0, 2, 4]),
        (3, lambda x: x[:, 1:-2], [1, 2, 3]),
        (2, lambda x: x.narrow(1, -3, 2), [3, 4]),
        (6, lambda x: x.flip(1), [5, 4, 3, 2, 1, 0]),
        (6, lambda x: x.roll(2, 1), [4, 5, 0, 1, 2, 3]),
        (6, lambda x: x.roll((1, -1), (0, 1)), [1, 2, 3, 4, 5, 0]),
        (6, lambda x: x[:, [5, 0, 4, 1, 3, 2]], [5, 0, 4, 1, 3, 2]),
        (4, lambda x: x[:, torch.tensor([1, 1, -1, 0])], [1, 1, 5, 0]),
        (2, lambda x: x.index_select(1, torch.tensor([4, 2])), [4, 2]),
        (4, lambda x: F.pad(x, (-1, -1)), [1, 2, 3, 4]),
    ],
    ids=(
        "swap overlap chunk split sizes sections indices step range narrow flip roll roll2 index repeated "
        "select crop"
    ).split(),
)  # fmt: skip
def test_units_keep_their_identity(out: int, function: Callable[[Tensor], Tensor], b: list[int]) -> None:
    a, found = between(6, out, function)
    # A position that nothing reads is removable all the same: it is a unit without a consumer.
    assert [a.index(unit) for unit in found] == b
    assert sorted(set(a)) == SIX


def test_no_part_is_ever_empty() -> None:
    """Without this, a plan could leave pooling nothing to pool; the parts are groups of their own."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        left, right = m.a(x).chunk(2, 1)
        return m.b(torch.cat([F.max_pool2d(left, 2), F.avg_pool2d(right, 2)], 1))

    graph = traced(Calls(forward, a=nn.Conv2d(3, 6, 1), b=nn.Conv2d(6, 2, 1)), torch.randn(2, 3, 4, 4))
    assert [(g.name, g.of_role("produce")[0].position.tolist()) for g in graph.groups] == [
        ("a", [0, 1, 2]),
        ("a#2", [3, 4, 5]),
    ]


def test_a_part_of_one_is_a_single_unit() -> None:
    net = Calls(lambda m, x: m.b(m.a(x)) + m.a(x)[:, -1:], a=nn.Linear(3, 5), b=nn.Linear(5, 2))
    graph = traced(net, torch.randn(4, 3))
    assert [(g.name, g.size) for g in graph.groups] == [("a", 4)]
    assert [(left.group.size, left.reason) for left in graph.left] == [(1, "a single unit")]


def test_zero_padding_makes_positions_that_follow_the_other_operand() -> None:
    """ResNet-20's shortcut: the padded channels go with those of the branch they are added to."""
    net = Calls(
        lambda m, x: m.c(F.relu(F.pad(m.a(x), (1, 2)) + m.b(x))),
        a=nn.Linear(3, 3),
        b=nn.Linear(3, 6),
        c=nn.Linear(6, 2),
    )
    graph = traced(net, torch.randn(2, 3))
    assert identities(graph, ("b.weight", 0, 6), ("a.weight", 0, 3), ("c.weight", 1, 6)) == [
        SIX,
        [1, 2, 3],
        SIX,
    ]


def test_padding_with_another_value_freezes() -> None:
    net = Calls(
        lambda m, x: m.c(m.b(F.pad(m.a(x), (1, 2), value=0.5))),
        a=nn.Linear(3, 3),
        b=nn.Linear(6, 4),
        c=nn.Linear(4, 2),
    )
    graph = traced(net, torch.randn(2, 3))
    assert [g.name for g in graph.groups] == ["b"]
    assert "aten.pad.default: padded with something other than zeros" in reasons(graph)


def test_select_needs_the_one_it_takes() -> None:
    net = Calls(
        lambda m, x: m.b(m.a(x)) + m.a(x).select(1, 2)[:, None] + m.a(x)[:, -1:],
        a=nn.Linear(3, 5),
        b=nn.Linear(5, 2),
    )
    graph = traced(net, torch.randn(4, 3))
    assert identities(graph, ("a.weight", 0, 5)) == [[0, 1, -1, 2, -1]]
    assert "aten.select.int: selected by its number" in reasons(graph)


def test_one_of_many_from_the_batch_or_time() -> None:
    assert between(4, 4, lambda x: x[:, -1], 2, 5, 3) == [[0, 1, 2, 3]] * 2
    assert between(4, 4, lambda x: x[:, 1:3].mean(1), 2, 5, 3) == [[0, 1, 2, 3]] * 2


def test_unbind_needs_every_position() -> None:
    """Along a new axis it takes apart what was stacked; along units it freezes them."""
    net = Calls(
        lambda m, x: m.c(sum(torch.stack([m.a(x), m.b(x)], 1).unbind(1))),
        a=nn.Linear(3, 4),
        b=nn.Linear(3, 4),
        c=nn.Linear(4, 2),
    )
    axes = [("a.weight", 0, 4), ("b.weight", 0, 4), ("c.weight", 1, 4)]
    assert identities(traced(net, torch.randn(2, 3)), *axes) == [[0, 1, 2, 3]] * 3
    net = Calls(
        lambda m, x: m.c(m.b(torch.stack(m.a(x).unbind(1)[::-1], 1))),
        a=nn.Linear(3, 4),
        b=nn.Linear(4, 5),
        c=nn.Linear(5, 2),
    )
    graph = traced(net, torch.randn(2, 3))
    assert [g.name for g in graph.groups] == ["b"]
    assert "aten.unbind.int: taken apart position by position" in reasons(graph)


def test_stacked_then_flattened() -> None:
    a, b = between(3, 6, lambda x: torch.stack([x, x.flip(1)], 2).flatten(1))
    assert (a, b) == ([0, 1, 0], [0, 0, 1, 1, 0, 0])  # stacked side by side, the first and the last are one


def test_rolling_everything_freezes() -> None:
    net = Calls(
        lambda m, x: m.c(m.b(m.a(x).roll(1))), a=nn.Linear(3, 4), b=nn.Linear(4, 5), c=nn.Linear(5, 2)
    )
    graph = traced(net, torch.randn(2, 3))
    assert [g.name for g in graph.groups] == ["b"]
    assert "aten.roll.default: rolled across all axes" in reasons(graph)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: x.gather(1, (x > 0).long()), "which positions are read depends on an index tensor"),
        (lambda x: x[:, (x[0] > 0).long()], "which positions are read depends on an index tensor"),
        (lambda x: x.topk(4, 1).values, "put in order"),
        (lambda x: x.sort(1).values, "put in order"),
    ],
)
def test_positions_that_depend_on_the_data_freeze(function: Callable[[Tensor], Tensor], reason: str) -> None:
    net = Calls(
        lambda m, x: m.c(m.b(function(m.a(x)))), a=nn.Linear(3, 4), b=nn.Linear(4, 5), c=nn.Linear(5, 2)
    )
    graph = traced(net, torch.randn(4, 3))
    assert [g.name for g in graph.groups] == ["b"]
    assert any(reason in r for r in reasons(graph))


def test_joined_along_the_batch() -> None:
    net = Calls(
        lambda m, x: m.c(torch.cat([m.a(x), m.b(x)], 0)),
        a=nn.Linear(3, 4),
        b=nn.Linear(3, 4),
        c=nn.Linear(4, 2),
    )
    axes = [("a.weight", 0, 4), ("b.weight", 0, 4), ("c.weight", 1, 4)]
    assert identities(traced(net, torch.randn(2, 3)), *axes) == [[0, 1, 2, 3]] * 3


def test_units_written_in_steps_stay() -> None:
    """A view of every other channel is none of what stays of them, so nothing may be written through it."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = m.a(x).clone()
        y[:, ::2] += 1.0
        return m.c(F.relu(m.b(F.relu(y))))

    graph = traced(Calls(forward, a=nn.Linear(3, 4), b=nn.Linear(4, 5), c=nn.Linear(5, 2)), torch.randn(2, 3))
    assert [g.name for g in graph.groups] == ["b"]
    assert "aten.slice.Tensor: written in steps" in reasons(graph)
