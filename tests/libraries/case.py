"""One model of another library: how it is made, what it is fed, and what its users do with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from tests.zoo.weights import build, settle

Inputs = tuple[Any, ...] | Mapping[str, Any]
"""Positional or keyword arguments of a model."""

Use = Callable[[nn.Module], Any]
"""What users do with the model beside calling it. Tensors that it returns are compared."""


@dataclass(frozen=True)
class Case:
    """One model.

    Attributes:
        name: Its own; unique.
        library: The package, as its registry spells it.
        make: Makes it, in a tiny configuration, with whatever weights its constructor draws.
        inputs: (batch size, size) -> example arguments, drawn from torch's global source of randomness.
        sizes: What `inputs` takes; the model is traced at the first.
        batches: Batch sizes; the model is traced with the first.
        uses: What its users do with it, each with a name.
        fresh: Whether it is traced as its constructor leaves it, before any forward pass.
        half: Whether the dense model can run in half precision at all.
        inexact: Whether an operator mixes all of its units, so that it can only be pruned inexactly.
        round_to: What the number of units left of each group is a multiple of.
    """

    name: str
    library: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int, Any], Inputs]
    sizes: tuple[Any, ...]
    batches: tuple[int, ...] = (2, 1, 3)
    uses: Mapping[str, Use] | None = None
    fresh: bool = False
    inexact: bool = False
    round_to: int = 1

    def model(self) -> nn.Module:
        """The model in eval mode, with random weights of which none is constant, and settled batch norms."""
        model = build(self.make)
        if self.fresh:
            return model
        return settle(model, [self.inputs(3, self.sizes[0]) for _ in range(2)])
