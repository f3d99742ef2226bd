"""Models that take few of the inputs one could draw: what the dense model refuses is no evidence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from tests.targets.units.plans import random_plan


class Bags(nn.Module):
    """Offsets begin with zero and ascend."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.o = nn.EmbeddingBag(20, 16, mode="sum"), nn.Linear(16, 12), nn.Linear(12, 3)

    def forward(self, ids: Tensor, offsets: Tensor) -> Tensor:
        return self.o(self.b(self.a(ids, offsets)).relu())


class Layers(nn.Module):
    """Three layers behind what a subclass does with its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.o = nn.Linear(6, 16), nn.Linear(16, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        return self.o(self.b(self.between(self.a(self.before(x)), *more)).relu())

    def before(self, x: Tensor) -> Tensor:
        return x

    def between(self, h: Tensor) -> Tensor:
        return h


class Covariance(Layers):
    """A matrix that has to be positive definite."""

    def between(self, h: Tensor, matrix: Tensor) -> Tensor:
        return torch.linalg.cholesky(matrix) @ h


class Spans(Layers):
    """Positions below the length."""

    def between(self, h: Tensor, start: Tensor, end: Tensor) -> Tensor:
        sums, rows = h.cumsum(1), torch.arange(len(h))
        return sums[rows, end] - sums[rows, start]


class Root(Layers):
    """Numbers in [-1, 1]."""

    def before(self, x: Tensor) -> Tensor:
        return (1 - x * x).sqrt()


class Kelvin(Layers):
    """Numbers above -273."""

    def before(self, x: Tensor) -> Tensor:
        return ((x + 273) / 300).log()


def definite(batch: int, size: int) -> Tensor:
    factor = torch.randn(batch, size, size)
    return factor @ factor.mT + torch.eye(size)


CHOOSY: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Any, ...]]]] = {
    "bags": (Bags, lambda: (torch.randint(20, (9,)), torch.tensor([0, 3, 5]))),
    "covariance": (Covariance, lambda: (torch.randn(3, 4, 6), definite(3, 4))),
    "spans": (
        Spans,
        lambda: (torch.randn(3, 8, 6), torch.tensor([0, 1, 2]), torch.tensor([7, 3, 5])),
    ),
}


@pytest.mark.parametrize("name", CHOOSY)
def test_what_the_dense_model_refuses_is_no_evidence(name: str) -> None:
    torch.manual_seed(0)
    make, inputs = CHOOSY[name]
    model, given = make().eval(), inputs()
    graph = sc.trace(model, given)
    plan = random_plan(graph)
    for small in (sc.apply(model, plan, graph=graph), sc.apply(model, plan, example_inputs=given)):
        assert sc.record_of(small).form == "module"
        proof = sc.verify(model, small, plan, given)
        assert proof.proven
        assert proof.difference <= 1e-9


def test_a_wrong_module_is_still_found() -> None:
    torch.manual_seed(0)
    model, given = Covariance().eval(), CHOOSY["covariance"][1]()
    graph = sc.trace(model, given)
    assert not graph.inputs.drawn
    plan = random_plan(graph)
    small = sc.apply(model, plan, graph=graph)
    with torch.no_grad():
        small.get_parameter("b.weight").mul_(1.001)
    with pytest.raises(sc.VerificationError, match=r"b\.weight"):
        sc.verify(model, small, plan, given)


def test_without_inputs_the_words_ask_for_some() -> None:
    model, given = Covariance().eval(), CHOOSY["covariance"][1]()
    graph = sc.trace(model, given)
    plan = random_plan(graph)
    small = sc.apply(model, plan, graph=graph)
    with pytest.raises(sc.SettingError, match=r"Covariance takes, got .*cholesky.*Pass example_inputs="):
        sc.verify(model, small, plan)
    with pytest.raises(sc.CaptureError, match=r"cholesky.*pass example_inputs="):
        sc.apply(model, plan)


class FourRows(Layers):
    """A matrix that is positive definite at one size only."""

    def between(self, h: Tensor, matrix: Tensor) -> Tensor:
        if h.shape[1] != 4:
            matrix = matrix - 100 * torch.eye(len(matrix[0]))
        return torch.linalg.cholesky(matrix) @ h


def test_a_size_at_which_nothing_could_be_compared_is_named() -> None:
    torch.manual_seed(0)
    model, given = FourRows().eval(), (torch.randn(3, 4, 6), definite(3, 4))
    graph = sc.trace(model, given)
    open_axes = sc.trace(Covariance().eval(), given).inputs.open
    inputs = graph.inputs.model_copy(update={"open": open_axes, "drawn": False, "together": False})
    plan = random_plan(graph).model_copy(update={"inputs": inputs})
    small = sc.apply(model, plan, graph=replace(graph, inputs=inputs))
    assert "nothing was compared at axis 1, 2 of x" in sc.record_of(small).note
    assert "Pass example_inputs=" in sc.record_of(small).note


@pytest.mark.parametrize(
    ("make", "low", "high"), [(Root, -1.0, 1.0), (Kelvin, -200.0, 30.0)], ids=["root", "kelvin"]
)
def test_floats_are_drawn_as_seen_where_noise_gives_nan(
    make: Callable[[], nn.Module], low: float, high: float
) -> None:
    torch.manual_seed(0)
    model, x = make().eval(), torch.rand(40, 6) * (high - low) + low
    graph = sc.trace(model, x)
    plan = random_plan(graph)
    small = sc.apply(model, plan, graph=graph)
    assert graph.inputs.drawn
    for _, (drawn,), _ in graph.inputs.examples():
        assert low <= float(drawn.min()) < float(drawn.max()) <= high
    assert sc.verify(model, small, plan).proven


def test_nan_is_no_evidence() -> None:
    torch.manual_seed(0)
    model, x = Root().eval(), torch.rand(4, 6)
    graph = sc.trace(model, x)
    plan = random_plan(graph)
    small = sc.apply(model, plan, graph=graph)
    with pytest.raises(sc.SettingError, match=r"not finite at x \[4, 6\]\. Pass example_inputs="):
        sc.verify(model, small, plan, x + 2, other_sizes=False)
