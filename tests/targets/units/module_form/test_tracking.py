"""Attributes that are sizes and something else as well: a scale, what an assertion compares a size with."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import secateur as sc


class Base(nn.Module):
    """Three layers, and the width between the first two."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 16
        self.a, self.b, self.out = nn.Linear(6, 16), nn.Linear(16, 12), nn.Linear(12, 3)

    def hidden(self, x: Tensor) -> Tensor:
        return self.a(x).relu()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.b(self.hidden(x)).relu())


class Power(Base):
    """The width is a size and, to a power, a scale."""

    def hidden(self, x: Tensor) -> Tensor:
        return self.a(x).view(len(x), -1, self.width) * self.width**-0.5


class Root(Base):
    """The same by a function of the standard library."""

    def hidden(self, x: Tensor) -> Tensor:
        return self.a(x).view(len(x), -1, self.width) / math.sqrt(self.width)


class Asserted(Base):
    """Asserts that a tensor is as wide as it says."""

    def hidden(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        assert h.shape[-1] == self.width
        return h


class Raised(Base):
    """Compares whole shapes, and raises."""

    def hidden(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        if h.shape != (len(x), x.shape[1], self.width):
            raise ValueError(f"expected a width of {self.width}, got {h.shape[-1]}")
        return h


class Claimed(Base):
    """Compares the width with a number, which stays; the call is mended then."""

    def hidden(self, x: Tensor) -> Tensor:
        assert self.width == 16
        return self.a(x).relu().view(len(x), -1, self.width)


class Impossible(Base):
    """Compares a live width with a number of the code."""

    def hidden(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        assert h.shape[-1] == 16
        return h


class Divided(nn.Module):
    """Divides a size that it reads off a tensor by its number of heads."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 4
        self.qkv, self.out = nn.ModuleList([nn.Linear(6, 12) for _ in range(3)]), nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        split = [layer(x) for layer in self.qkv]
        q, k, v = (
            y.reshape(*y.shape[:2], self.heads, y.shape[-1] // self.heads).transpose(1, 2) for y in split
        )
        mixed = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        if mixed.shape[1] != self.heads:
            raise ValueError(f"expected {self.heads} heads")
        return self.out(mixed.transpose(1, 2).flatten(2))


def test_the_size_of_a_head_is_read_off_and_their_number_follows() -> None:
    torch.manual_seed(0)
    model, x = Divided().double().eval(), torch.randn(2, 5, 6, dtype=torch.float64)
    graph = sc.trace(model, x)
    keep = {g.name: np.arange(g.size) != 1 for g in graph.groups if g.size == 4}
    plan = sc.Plan.build(graph, keep, allocator="by hand", settings={})
    small = sc.apply(model, plan, "module", graph=graph)
    assert (small.heads, sc.record_of(small).captured) == (3, ())
    torch.testing.assert_close(small(x), sc.apply(model, plan, "masked")(x), rtol=1e-11, atol=1e-11)


def applied(make: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model, x = make().double().eval(), torch.randn(2, 5, 6, dtype=torch.float64)
    graph = sc.trace(model, x)
    plan = sc.Uniform(ratio=0.25).allocate(graph, sc.score(graph, None, "magnitude"))
    assert type(model.width) is int
    return sc.apply(model, plan, "module", graph=graph), sc.apply(model, plan, "masked")


@pytest.mark.parametrize(
    ("make", "width", "mended"),
    [
        (Power, 16, ("",)),
        (Root, 16, ("",)),
        (Asserted, 12, ()),
        (Raised, 12, ()),
        (Claimed, 16, ("",)),
    ],
)
def test_a_number_stays_and_what_is_compared_with_a_size_follows_it(
    make: Callable[[], nn.Module], width: int, mended: tuple[str, ...]
) -> None:
    small, masked = applied(make)
    assert (small.width, type(small.width), sc.record_of(small).captured) == (width, int, mended)
    for shape in ((2, 5, 6), (3, 9, 6), (16, 12, 6)):
        x = torch.randn(shape, dtype=torch.float64)
        torch.testing.assert_close(small(x), masked(x), rtol=1e-11, atol=1e-11)


def test_an_assertion_on_a_number_of_the_code_is_refused() -> None:
    with pytest.raises(sc.ApplyError, match="AssertionError"):
        applied(Impossible)
