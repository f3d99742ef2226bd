"""One architecture of the zoo: how it is made, and what it is fed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from tests.zoo.importing import import_timm, import_torchvision, import_transformers
from tests.zoo.weights import Inputs, build, settle

Family = Literal["torchvision", "timm", "transformers", "plain"]
"""The library that defines an architecture; ``plain``: this repository, in PyTorch alone."""

Example = Callable[[int, torch.Generator], Inputs]
"""(batch size, source of randomness) -> example arguments in float32."""

LIBRARIES = {"torchvision": import_torchvision, "timm": import_timm, "transformers": import_transformers}


@dataclass(frozen=True)
class Entry:
    """One architecture.

    Attributes:
        name: As its library spells it.
        family: The library that defines it.
        construct: Makes it, with whatever weights its constructor draws.
        example: Makes arguments for it.
        settling: Makes the arguments that settle its batch norms; those of `example` if None.
        inexact: Whether an operator mixes all of its units, so that it can only be pruned inexactly.
    """

    name: str
    family: Family
    construct: Callable[[], nn.Module]
    example: Example
    settling: Example | None = None
    inexact: bool = False

    def available(self) -> bool:
        """Whether the library that defines it can be imported here."""
        return self.family == "plain" or LIBRARIES[self.family]() is not None

    def make(self, seed: int = 0) -> nn.Module:
        """The model in eval mode, with random weights and settled batch norms; the same for one seed."""
        if not self.available():
            message = f"zoo: expected {self.family} to be installed for {self.name}. Do `make test`."
            raise ModuleNotFoundError(message, name=self.family)
        model = build(self.construct, seed)
        generator = torch.Generator().manual_seed(seed + 1)
        example = self.settling or self.example
        return settle(model, [example(2, generator) for _ in range(2)])

    def inputs(self, batch: int = 2, dtype: torch.dtype = torch.float32, seed: int = 2) -> Inputs:
        """Example arguments; floating ones in `dtype`."""
        inputs = self.example(batch, torch.Generator().manual_seed(seed))

        def cast(x: Tensor) -> Tensor:
            return x.to(dtype) if x.is_floating_point() else x

        if isinstance(inputs, tuple):
            return tuple(map(cast, inputs))
        return {name: cast(x) for name, x in inputs.items()}


def images(side: int, channels: int = 3) -> Example:
    """Square images of normal noise. [batch, channels, side, side]"""
    return lambda batch, generator: (torch.randn(batch, channels, side, side, generator=generator),)
