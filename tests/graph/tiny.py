"""Tiny networks around one operator, and what a trace says of them in a form that can be written down."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import secateur as sc
from secateur.targets.units.compare import relative_difference, run
from secateur.targets.units.graph_form.program import sliced_program
from tests.targets.units.plans import random_plan


class Between(nn.Module):
    """A linear layer `a` with `into` outputs, what `function` makes of them, and a linear layer `b`."""

    def __init__(self, into: int, out: int, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.function = nn.Linear(3, into), nn.Linear(out, 2), function

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.function(self.a(x)))


class Calls(nn.Module):
    """Submodules and parameters by name, and a function of them and the inputs."""

    def __init__(self, function: Callable[..., Any], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


def identities(graph: sc.Graph, *axes: tuple[str, int, int]) -> list[list[int]]:
    """For each (tensor, axis, size) the unit that sits at each position: equal numbers go together.

    Numbers count up in order of first appearance, over all the axes; -1 is never removed.
    """
    numbers: dict[tuple[str, int], int] = {}
    found = []
    for tensor, axis, size in axes:
        row = [-1] * size
        for group in graph.groups:
            for piece in group.slices:
                if (piece.tensor, piece.axis) == (tensor, axis):
                    for position, unit in zip(piece.position.tolist(), piece.unit.tolist(), strict=True):
                        row[position] = numbers.get((group.name, unit), len(numbers))
                        row[position] = numbers.setdefault((group.name, unit), row[position])
        found.append(row)
    ordered = {old: new for new, old in enumerate(dict.fromkeys(n for row in found for n in row if n >= 0))}
    return [[ordered.get(n, -1) for n in row] for row in found]


def between(into: int, out: int, function: Callable[[Tensor], Tensor], *x: int) -> list[list[int]]:
    """`identities` along the outputs of `a` and the inputs of `b`, once removal is shown to be exact.

    Args:
        into: Outputs of `a`.
        out: Inputs of `b`.
        function: What is between them.
        x: The shape of the input; [4, 3] if not given.
    """
    graph = traced(Between(into, out, function), torch.randn(*(x or (4, 3))))
    return identities(graph, ("a.weight", 0, into), ("b.weight", 1, out))


def traced(model: nn.Module, *inputs: Tensor, allow_inexact: bool = False) -> sc.Graph:
    """A trace in float64, once the sliced program is shown to equal the masked model for a random plan."""
    model = model.double().eval()
    inputs = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    graph = sc.trace(model, inputs, allow_inexact=allow_inexact)
    if all(group.exact for group in graph.groups):
        plan = random_plan(graph)
        sliced = sliced_program(model, graph, plan)
        wanted = run(sc.apply(model, plan, "masked"), inputs, {})
        difference = relative_difference(run(sliced, inputs, {}), wanted)
        if not difference <= 1e-9:
            raise AssertionError(f"the sliced program differs from the masked model by {difference:.2g}")
    return graph


def reasons(graph: sc.Graph) -> set[str]:
    """Why anything is frozen."""
    return {frozen.reason for frozen in graph.frozen}
