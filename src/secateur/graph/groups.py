"""Groups of units, the places of units in tensors, and what is frozen: plain data without a model.

A *unit* is a set of tensor slices that can only be removed together. A *group* is all units that the same
layers produce.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Role = Literal["produce", "consume", "match", "scale", "expert", "block"]
"""What a tensor does with a unit. ``produce``: it computes the unit (output axis of a weight, its bias).
``consume``: it reads the unit (input axis of a weight). ``match``: it computes a unit that a product of
activations reads, such as q k^T, so that zeros here silence it; ``produce`` names the same places.
``scale``: it scales or shifts the unit (weight, bias and statistics of a batch norm, layer scale).
``expert``: it belongs to an expert, or to its row of the router, in plans that remove units too. ``block``:
it is no tensor but a residual block, named by its path."""

Stage = Literal["produced", "normalised", "activated"]
"""``produced``: the output of a producing layer. ``normalised``: after the normalisation directly behind it.
``activated``: after the activation directly behind that."""


@dataclass(frozen=True, eq=False)
class Slice:
    """The places of a group's units along one axis of one parameter or buffer.

    Attributes:
        tensor: Name in the model's state dict; for tied tensors, the first name.
        axis: The axis that shrinks when units are removed.
        role: What the tensor does with the units.
        position: Indices along `axis`, ascending. [entries]
        unit: The unit, in [0, group.size), that each position belongs to. [entries] A unit may have several
            positions, as in flattened maps or gated halves. Positions of other groups are left out.
    """

    tensor: str
    axis: int
    role: Role
    position: NDArray[np.int64] = field(repr=False)
    unit: NDArray[np.int64] = field(repr=False)

    def removed(self, keep: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Return the positions of the units for which `keep` is False. [group.size]"""
        return self.position[~keep[self.unit]]


@dataclass(frozen=True, eq=False)
class Site:
    """A value of the captured program where the activations of a group can be observed.

    Attributes:
        node: Name of the node in ``graph.program.graph``.
        axis: Axis of that node's output along which the units lie.
        stage: Whether the value is the output of the layer, or comes after its normalisation or activation.
        producer: State-dict name of the weight whose output this is.
        position: Indices along `axis`. [entries]
        unit: The unit each position belongs to. [entries]
    """

    node: str
    axis: int
    stage: Stage
    producer: str
    position: NDArray[np.int64] = field(repr=False)
    unit: NDArray[np.int64] = field(repr=False)


@dataclass(frozen=True, eq=False)
class Group:
    """Units that the same layers produce. They can be compared with each other, and cost the same.

    Attributes:
        name: Path of the first module that produces the units, with ``#2`` and so on if groups share it.
        size: Number of units.
        slices: The places of the units in tensors, one entry for each axis and role.
        sites: The values where their activations can be observed, in order of execution.
        exact: True if removing a unit does not change what the other units compute. Layers that read the unit
            only lose its own contribution.
        inexact_because: The operators that mix the units without weights, if there are any.
    """

    name: str
    size: int
    slices: tuple[Slice, ...]
    sites: tuple[Site, ...]
    exact: bool
    inexact_because: tuple[str, ...] = ()

    def of_role(self, role: Role) -> tuple[Slice, ...]:
        """The slices with this role, in order of execution."""
        return tuple(s for s in self.slices if s.role == role)


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


@dataclass(frozen=True, eq=False)
class Left:
    """A group of which no unit may be removed.

    Attributes:
        group: The group.
        reason: Why: an operator mixes it, it is a single unit, or no layer produces it.
    """

    group: Group
    reason: str


@dataclass(frozen=True)
class Frozen:
    """Part of a tensor axis that may not shrink, and why.

    Attributes:
        tensor: Name in the state dict.
        axis: The axis.
        count: How many of its positions are frozen.
        reason: What freezes them: ``model output``, ``model input x``, or an operator.
        where: The source line or module that the reason points to; empty if unknown.
    """

    tensor: str
    axis: int
    count: int
    reason: str
    where: str = ""


def group_called(groups: Iterable[Group], name: str) -> Group:
    """The group of this name.

    Raises:
        KeyError: There is none.
    """
    known = {group.name: group for group in groups}
    if name not in known:
        raise KeyError(f"graph[{name!r}]: expected one of {[*known][:20]}.")
    return known[name]
