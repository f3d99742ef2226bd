"""Code with several conditions: the pruned model is right, or refuses, on every side of two of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import secateur as sc

Asks = Callable[[str], bool]
Body = Callable[[Tensor, Asks, str, str], Tensor]


class Net(nn.Module):
    """Linear layers with code between them that depends on two conditions."""

    def __init__(self, body: Body, first: str, second: str) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 12), nn.Linear(12, 10), nn.Linear(10, 3)
        self.body, self.names = body, (first, second)
        self.on, self.also = False, False

    def asks(self, name: str, x: Tensor, y: Any, fast: bool) -> bool:
        """One of the conditions."""
        if name == "length":
            return x.shape[1] > 6
        if name == "batch":
            return x.shape[0] > 4
        if name == "optional":
            return y is not None
        if name == "switch":
            return fast
        if name == "value":
            return bool(x[0, 0, 0] > 0)
        if name == "flag":
            return self.on
        return self.also

    def forward(self, x: Tensor, y: Any = None, fast: bool = False) -> Tensor:
        """[batch, length, 6] to [batch, length, 3]."""
        h = self.body(self.a(x).relu(), lambda name: self.asks(name, x, y, fast), *self.names)
        return self.c(self.b(h).relu())


def both(h: Tensor, asks: Asks, first: str, second: str) -> Tensor:
    return h.softmax(-1) if asks(first) and asks(second) else h


def variable(h: Tensor, asks: Asks, first: str, second: str) -> Tensor:
    places = 1 if asks(first) else 0
    return h.roll(places, -1) if asks(second) else h


def nested(h: Tensor, asks: Asks, first: str, second: str) -> Tensor:
    if asks(first):
        h = h * 2
        if asks(second):
            h = h.sort(-1).values
    return h


def sized(h: Tensor, asks: Asks, first: str, second: str) -> Tensor:
    size = 4 if asks(first) else 12
    if asks(second):
        h = h.unflatten(-1, (-1, size))
        h = (h - h.mean(-1, keepdim=True) * (size < 12)).flatten(-2)
    return h


def table(h: Tensor, asks: Asks, first: str, second: str) -> Tensor:
    functions = (torch.relu, torch.tanh, lambda v: v.cumsum(-1))
    return functions[int(asks(first)) + int(asks(second))](h)


NAMES = ("length", "batch", "optional", "switch", "value", "flag", "other flag")
QUICK = {
    (nested, "value", "length"),
    (nested, "flag", "length"),
    (nested, "flag", "value"),
    (both, "value", "flag"),
    (both, "flag", "other flag"),
    (both, "optional", "flag"),
    (variable, "switch", "optional"),
    (table, "length", "batch"),
    (sized, "flag", "optional"),
}
CASES = [
    pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow)
    for case in (
        (body, *pair)
        for body in (both, variable, nested, sized, table)
        for pair in itertools.permutations(NAMES, 2)
    )
]


@pytest.mark.parametrize(("body", "first", "second"), CASES)
def test_every_combination_of_two_conditions(body: Body, first: str, second: str) -> None:
    torch.manual_seed(0)
    model, x = Net(body, first, second).double().eval(), torch.randn(2, 5, 6).double()
    x[0, 0, 0] = -1
    more: list[Any] = []
    more += [{"x": x, "y": torch.randn(2, 3).double()}] if "optional" in (first, second) else []
    more += [{"x": x, "fast": True}] if "switch" in (first, second) else []
    graph = sc.trace(model, {"x": x}, more_inputs=more)
    keep = {g.name: np.arange(g.size) % 3 != 1 for g in graph.groups}
    plan = sc.Plan.build(graph, keep, allocator="every third")
    small, masked = (sc.apply(model, plan, form, graph=graph) for form in ("module", "masked"))
    sides = {name: (False, True) if name in (first, second) else (False,) for name in NAMES}
    right = 0
    for chosen in itertools.product(*sides.values()):
        side = dict(zip(NAMES, chosen, strict=True))
        given: dict[str, Any] = {
            "x": torch.randn(6 if side["batch"] else 2, 9 if side["length"] else 5, 6).double()
        }
        given["x"][0, 0, 0] = 1 if side["value"] else -1
        given |= {"y": torch.randn(2, 3).double()} if side["optional"] else {}
        given |= {"fast": True} if side["switch"] else {}
        small.on = masked.on = side["flag"]
        small.also = masked.also = side["other flag"]
        try:
            found = small(**given)
        except sc.InputError:
            assert side["flag"] or side["other flag"]
            continue
        torch.testing.assert_close(found, masked(**given))
        right += 1
    assert right
