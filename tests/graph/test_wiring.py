"""Code that runs the same lines at other sizes, or in another mode, and connects their results otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import secateur as sc


def swapped(one: Tensor, two: Tensor, turn: bool) -> tuple[Tensor, Tensor]:
    return (two, one) if turn else (one, two)


def in_a_list(one: Tensor, two: Tensor, turn: bool) -> tuple[Tensor, Tensor]:
    both = [one, two]
    if turn:
        both = both[::-1]
    first, second = torch.cat(both, -1).chunk(2, -1)
    return first, second


def by_halves(one: Tensor, two: Tensor, turn: bool) -> tuple[Tensor, Tensor]:
    both = torch.cat([one, two], -1).chunk(2, -1)
    return both[int(turn)], both[1 - int(turn)]


def by_slices(one: Tensor, two: Tensor, turn: bool) -> tuple[Tensor, Tensor]:
    both, n = torch.cat([one, two], -1), one.shape[-1]
    first, second = both[..., :n], both[..., n:]
    return (second, first) if turn else (first, second)


def written(one: Tensor, two: Tensor, turn: bool) -> tuple[Tensor, Tensor]:
    first, second = torch.zeros_like(one), torch.zeros_like(two)
    (second if turn else first)[:] = one
    (first if turn else second)[:] = two
    return first, second


def in_place(one: Tensor, two: Tensor, turn: bool) -> tuple[Tensor, Tensor]:
    first, second = (two, one) if turn else (one, two)
    return first.neg_(), second.neg_()


def transposed(one: Tensor, two: Tensor, turn: bool) -> tuple[Tensor, Tensor]:
    first, second = (two, one) if turn else (one, two)
    return first.mT.mT, second.T.T


WAYS = [swapped, in_a_list, by_halves, by_slices, written, in_place, transposed]


class Net(nn.Module):
    """Two layers, of which the results may change places before the layers that read them."""

    def __init__(self, way: Callable[..., tuple[Tensor, Tensor]], asks: str) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 9), nn.Linear(6, 9)
        self.left, self.right = nn.Linear(9, 4), nn.Linear(9, 4)
        self.way, self.asks, self.turned = way, asks, False

    def forward(self, x: Tensor) -> Tensor:
        """[batch, length, 6] to [batch, length, 4]."""
        asks = {"size": x.shape[1] > 8, "root": int(x.shape[1] ** 0.5) > 2, "shape": x.shape == (2, 12, 6)}
        turn = {**asks, "training": self.training, "flag": self.turned}[self.asks]
        one, two = self.way(torch.relu(self.one(x)), torch.relu(self.two(x)), turn)
        return self.left(one) + self.right(two).tanh()


class Matrix(nn.Module):
    """Multiplies by a square matrix from one side or the other, in one call."""

    def __init__(self, asks: str) -> None:
        super().__init__()
        self.one, self.head = nn.Linear(6, 9), nn.Linear(9, 4)
        self.matrix = nn.Parameter(torch.randn(9, 9))
        self.asks, self.turned = asks, False

    def forward(self, x: Tensor) -> Tensor:
        """[batch, length, 6] to [batch, length, 4]."""
        asks = {"size": x.shape[1] > 8, "training": self.training, "flag": self.turned}
        turn = {**asks, "dtype": x.dtype == torch.float32}[self.asks]
        hidden = torch.relu(self.one(x))
        return self.head(torch.einsum("bni,oi->bno" if turn else "bni,io->bno", hidden, self.matrix))


class Index(nn.Module):
    """Takes units in one of two orders, on one line."""

    def __init__(self, asks: str) -> None:
        super().__init__()
        self.one, self.head = nn.Linear(6, 9), nn.Linear(9, 4)
        self.register_buffer("usual", torch.arange(9))
        self.register_buffer("other", torch.randperm(9))
        self.asks, self.turned = asks, False

    def forward(self, x: Tensor) -> Tensor:
        """[batch, length, 6] to [batch, length, 4]."""
        turn = {"size": x.shape[1] > 8, "training": self.training, "flag": self.turned}[self.asks]
        return self.head(torch.relu(self.one(x))[..., self.other if turn else self.usual])


def set_up(model: Any, asks: str, turn: bool, x: Tensor) -> Tensor:
    """Let the condition be true or false in a model, and return inputs for it."""
    if asks == "training":
        model.train(turn)
    elif asks == "flag":
        model.turned = turn
    elif asks == "dtype":
        model.to(torch.float32 if turn else torch.float64)
        x = x.to(model.matrix.dtype)
    return x[:, : 12 if turn and asks in ("size", "root", "shape") else 5]


def check(model: nn.Module, asks: str) -> None:
    """Prune a model, and compare it with the masked one on both sides of the condition."""
    model, x = model.double().eval(), torch.randn(2, 12, 6).double()
    graph = sc.trace(model, x[:, :5])
    # Each group loses other units, so that they cannot be taken for each other.
    keep = {g.name: np.arange(g.size) % 3 != number % 3 for number, g in enumerate(graph.groups)}
    plan = sc.Plan.build(graph, keep, allocator="by hand")
    small, masked = (sc.apply(model, plan, form, graph=graph) for form in ("module", "masked"))
    for turn in (False, True):
        given = set_up(small, asks, turn, x)
        set_up(masked, asks, turn, x)
        if turn and asks == "flag":
            with pytest.raises(sc.InputError, match="removed"):
                small(given)
        else:
            torch.testing.assert_close(small(given), masked(given))


@pytest.mark.parametrize("asks", ["size", "root", "shape", "training", "flag"])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_the_same_calls_with_other_connections_are_right_or_refused(way: Any, asks: str) -> None:
    torch.manual_seed(0)
    check(Net(way, asks), asks)


@pytest.mark.parametrize(
    ("kind", "asks"),
    [
        (Matrix, "size"),
        (Matrix, "training"),
        (Matrix, "flag"),
        (Matrix, "dtype"),
        (Index, "size"),
        (Index, "training"),
    ],
)
def test_the_same_call_with_another_equation_or_index_is_right_or_refused(kind: Any, asks: str) -> None:
    torch.manual_seed(0)
    check(kind(asks), asks)


def test_a_loop_makes_no_new_connections_at_other_lengths() -> None:
    """Else each length would be captured."""

    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.read, self.keep, self.head = nn.Linear(6, 9), nn.Linear(9, 9), nn.Linear(9, 4)

        def forward(self, x: Tensor) -> Tensor:
            state, found = torch.zeros(x.shape[0], 9), []
            for step in x.unbind(1):
                state = torch.tanh(self.read(step) + self.keep(state))
                found.append(state)
            return self.head(torch.stack(found, 1))

    graph = sc.trace(Loop().eval(), torch.randn(2, 7, 6))
    length = next(axis for axis in graph.inputs.open if axis.size == 7)
    assert not length.further
