"""The names in the code that a forward pass may reach."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from secateur.targets.units.later_calls.reachable import Reachable

LEVEL, UNREAD = 1, 2


def helper(x: Tensor, config: Any) -> Tensor:
    return x * LEVEL if config.deep else x


def decorated(function: Any) -> Any:
    @functools.wraps(function)
    def inner(*args: Any) -> Any:
        return function(*args)

    return inner


class Net(nn.Module):
    @property
    def shown(self) -> Any:
        """A property."""
        return self.hidden

    def unused(self) -> Any:
        """Nothing calls it."""
        return self.beside, UNREAD

    @decorated
    def forward(self, x: Tensor) -> Tensor:
        """Of any shape."""
        self.calls = getattr(self, "maybe", 0)
        return helper(x, self.config) if self.shown else (lambda y: y * self.inner)(x)


def test_names_that_the_forward_pass_may_reach() -> None:
    found = Reachable(Net())
    assert {"shown", "hidden", "config", "deep", "inner", "maybe"} <= found.names
    assert not {"beside", "UNREAD"} & found.names
    assert "maybe" in found.asked
    assert found.stored == {"calls"}  # what a decorator hides may be of any object
    assert found.globals == {__name__: {"helper", "LEVEL"}}


def test_names_beyond_the_first_256() -> None:
    lines = [f"self.n{k} = self.m{k}" for k in range(300)]
    space: dict[str, Any] = {"nn": nn, "torch": torch, "__name__": "yours"}
    body = "".join(f"        {line}\n" for line in lines)
    exec(f"class Long(nn.Module):\n    def forward(self, x):\n{body}        return x\n", space)
    found = Reachable(space["Long"]())
    assert found.stored_by(space["Long"]) == {f"n{k}" for k in range(300)}
    assert {f"m{k}" for k in range(300)} <= found.names


def test_who_sets_an_attribute() -> None:
    class Other(nn.Module):
        @staticmethod
        def of(model: Any) -> None:
            """Set what is another's."""
            model.static = 1

        def forward(self, x: Tensor) -> Tensor:
            """Of any shape."""
            self.of(self)
            self.mine, x.theirs = 1, 2  # type: ignore[attr-defined]
            return x

    found = Reachable(nn.Sequential(Other(), nn.ReLU()))
    assert found.stored_by(Other) == {"mine"}
    assert found.stored == {"static", "theirs"}
    assert found.stored_by(Net) == set()
