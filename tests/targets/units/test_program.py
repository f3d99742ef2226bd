"""The captured program: what it takes, and what it says of all else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from tests.targets.units.plans import random_plan


class Features(nn.Module):
    """A model with a second method, whose code holds a size."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 12)
        self.head = nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 3))

    def features(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu() + torch.tensor(range(16))).relu()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def test_methods_that_were_asked_for_do_not_get_lost() -> None:
    model, x = Features().eval(), torch.randn(4, 6)
    graph = sc.trace(model, x, methods=["features"])
    plan = random_plan(graph)
    with pytest.raises(sc.ApplyError, match="methods features"):
        sc.apply(model, plan, "graph", graph=graph)
    with pytest.raises(sc.ApplyError, match=r"got neither.*on_unrealisable='leave'"):
        sc.apply(model, plan, graph=graph)
    small = sc.apply(model, plan, graph=graph, on_unrealisable="leave")
    rest = sc.record_of(small).plan
    assert [g.name for g in rest.groups if g.removed] == ["head.0"]
    torch.testing.assert_close(small.features(x), model.features(x))


class Last(nn.Module):
    """Looks at the last twenty steps."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.o = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.a(x[:, -20:]).relu())


def test_sizes_that_are_refused_name_the_users_line() -> None:
    model = Last().eval()
    graph = sc.trace(model, torch.randn(2, 5, 6))
    small = sc.apply(model, random_plan(graph), "graph", graph=graph)
    assert small(torch.randn(3, 9, 6)).shape == (3, 9, 3)
    wanted = r"axis 1 of x <=? 20.*\(test_program\.py:\d+: return self\.o\(self\.a\(x\[:, -20:\]"
    with pytest.raises(sc.InputError, match=wanted):
        small(torch.randn(3, 25, 6))


class Auxiliary(nn.Module):
    """Returns more in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.o, self.aux = nn.Linear(6, 16), nn.Linear(16, 3), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        return self.o(h) + self.aux(h) if self.training else self.o(h)


def test_a_program_without_training_loads_into_a_model_as_its_constructor_makes_it(tmp_path: Path) -> None:
    model, x = Auxiliary().eval(), torch.randn(4, 6)
    graph = sc.trace(model, x)
    small = sc.apply(model, random_plan(graph), "graph", graph=graph)
    loaded = sc.load(sc.save(small, tmp_path), Auxiliary)  # which makes it in training mode
    assert not any(module.training for module in loaded.modules())
    assert torch.equal(loaded(x), small(x))
    with pytest.raises(sc.ApplyError, match="training mode"):
        loaded.train()
    with pytest.raises(sc.ApplyError, match="training mode"):
        sc.apply(model.train(), random_plan(graph), "graph", graph=graph)


class Lengths(nn.Module):
    """Reads its sizes in one way or another, and holds none of them."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.a, self.o = way, nn.Linear(6, 16), nn.Linear(16, 3)
        if way == "table":
            self.register_buffer("table", torch.linspace(0, 1, 32 * 16).view(32, 16))
        if way == "len":
            self.token = nn.Parameter(torch.full((1, 1, 16), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        if self.way == "table":
            h = h * self.table[: x.shape[1]]
        elif self.way == "window":
            h = h[:, : min(12, x.shape[1])]
        elif self.way == "len":
            h = torch.cat([self.token.expand(len(x), 1, -1), h], 1)
        elif self.way == "len of a row":
            h = h.flatten(0, 1).view(len(x), len(x[0]), -1)
        return self.o(h)


@pytest.mark.parametrize("way", ["table", "window", "len", "len of a row"])
def test_a_program_takes_the_sizes_that_the_model_takes(way: str) -> None:
    torch.manual_seed(0)
    model, x = Lengths(way).double().eval(), torch.randn(2, 5, 6).double()
    graph = sc.trace(model, x)
    plan = random_plan(graph)
    small, masked = (sc.apply(model, plan, form, graph=graph) for form in ("graph", "masked"))  # type: ignore[arg-type]
    for shape in ((2, 5, 6), (3, 5, 6), (2, 9, 6), (4, 4, 6)):
        other = torch.randn(shape).double()
        for training in (False, True):
            assert torch.allclose(small.train(training)(other), masked.train(training)(other), atol=1e-12)
    assert small.float()(torch.randn(3, 7, 6)).dtype == torch.float32


class Negative(nn.Module):
    """Computes with a size where autocast is off."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        with torch.autocast("cpu", enabled=False):
            turned = torch.arange(x.shape[1], device=x.device)[-(x.shape[1] - 1) :]
            h = h * turned.cos().sum()
        return self.b(h)


def test_arithmetic_on_sizes_in_an_autocast_region() -> None:
    torch.manual_seed(0)
    model, x = Negative().double().eval(), torch.randn(2, 5, 4, dtype=torch.float64)
    graph = sc.trace(model, x)
    plan = sc.Uniform(ratio=0.25).allocate(graph, sc.score(graph, None, "magnitude"))
    small, masked = sc.apply(model, plan, "graph", graph=graph), sc.apply(model, plan, "masked")
    for length in (5, 9):
        x = torch.randn(3, length, 4, dtype=torch.float64)
        torch.testing.assert_close(small(x), masked(x))


class Alone(nn.Module):
    """A network that treats a single sample in another way, which couples units."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 12), nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Gives three numbers."""
        h = self.a(x).relu()
        if x.size(0) == 1:
            h = h.flip(-1)
        return self.c(self.b(h).relu())


def test_a_program_that_refuses_what_was_traced_is_no_result() -> None:
    """One sample was traced, of which a capture makes two; a module is right for both."""
    one = torch.randn(1, 4, dtype=torch.float64)
    two = torch.cat([one, one])
    for traced in (one, two):
        model = Alone().double().eval()
        plan = random_plan(sc.trace(model, traced), 0.4, 1)
        small = sc.apply(model, plan)
        for given in (one, two):
            assert torch.allclose(small(given), sc.apply(model, plan, "masked")(given))
    model = Alone().double().eval()
    plan = random_plan(sc.trace(model, one), 0.4, 1)
    with pytest.raises(sc.ApplyError, match=r"takes inputs of the traced sizes, .* a batch of 2 or more\."):
        sc.apply(model, plan, "graph")
