"""What the engine finds: groups of units, where they sit, and what is frozen.

Plain frozen data. A *unit* is a set of tensor slices that can only be removed together; a *group* is
the units that the same layers produce. Nothing here holds a model or runs one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Role = Literal["produce", "consume", "scale"]
"""``produce``: the layer that computes the unit (output axis of a weight, its bias).
``consume``: a layer that reads the unit (input axis of a weight). ``scale``: a tensor applied to the
unit elementwise (batch-norm weight, bias and statistics, layer scale)."""

Stage = Literal["produced", "normalised", "activated"]
"""``produced``: the output of a producing layer. ``normalised``: after the normalisation that follows
it, if one does. ``activated``: after the activation that follows, if one does."""


@dataclass(frozen=True, eq=False)
class Slice:
    """Where a group's units sit along one axis of one parameter or buffer.

    Attributes:
        tensor: Name in the model's state dict (the first name, for tied tensors).
        axis: The axis that would shrink.
        role: What the tensor does with the units.
        position: Indices along `axis`, ascending. [entries]
        unit: The unit, in [0, group.size), that each position belongs to. [entries] A unit may have
            several positions (flattened maps, gated halves); positions of other groups are absent.
    """

    tensor: str
    axis: int
    role: Role
    position: NDArray[np.int64]
    unit: NDArray[np.int64]

    def removed(self, keep: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Positions that go when `keep` [group.size] is False for their unit."""
        return self.position[~keep[self.unit]]


@dataclass(frozen=True, eq=False)
class Site:
    """A value of the captured program in which a group's activations can be observed.

    Attributes:
        node: Name of the node in ``graph.program.graph``.
        axis: Axis of that node's output along which the units lie.
        stage: How far behind the producing layer the value is.
        producer: State-dict name of the weight whose output this is.
        position: Indices along `axis`. [entries]
        unit: The unit each position belongs to. [entries]
    """

    node: str
    axis: int
    stage: Stage
    producer: str
    position: NDArray[np.int64]
    unit: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Group:
    """Units that the same layers produce, and so can be compared and counted together.

    Attributes:
        name: The first producing layer's module path (with ``#2``, ... where that is not unique).
        size: Number of units.
        slices: Every tensor axis the units touch.
        sites: Where their activations can be observed, in order of execution.
        exact: True if removing units leaves what the others compute unchanged, apart from the
            removed units' own contribution to their consumers.
        inexact_because: The operators that mix the units without weights, if any.
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
class Left:
    """A group that is left alone as a whole.

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
        reason: What froze them: ``model output``, ``model input x``, or the operator without a rule.
        where: The source line or module that the reason points to; empty if unknown.
    """

    tensor: str
    axis: int
    count: int
    reason: str
    where: str = ""
