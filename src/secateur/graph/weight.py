"""Groups of single weights: each entry of a weight tensor is a unit."""

from __future__ import annotations

import math
from dataclasses import dataclass

from secateur.graph.groups import Group


@dataclass(frozen=True, eq=False)
class WeightGroup(Group):
    """The entries of one weight tensor, in the order of ``tensor.reshape(-1)``.

    Attributes:
        shape: The shape of the tensor, outputs first. ``name`` is the name in the model's state dict.
    """

    shape: tuple[int, ...] = ()

    @classmethod
    def of(cls, name: str, shape: tuple[int, ...]) -> WeightGroup:
        """Make the group of the tensor with this name and shape."""
        return cls(name, math.prod(shape), slices=(), sites=(), exact=True, shape=shape)

    @property
    def rows(self) -> tuple[int, int]:
        """The number of outputs, and the number of weights of each output."""
        return self.shape[0], math.prod(self.shape[1:])
