"""What one group of a model loses, as data: units, and the positions of every tensor that go with them."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from secateur.common.reading import Count
from secateur.errors import PlanError
from secateur.graph.groups import Group, Role


class Record(BaseModel):
    """Frozen, without unknown fields, and without silent conversions."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class SliceDecision(Record):
    """What one axis of one tensor loses.

    Attributes:
        tensor: Name in the model's state dict.
        axis: The axis that shrinks.
        role: What the tensor does with the units.
        removed: Positions along `axis` that go, ascending; empty where nothing does.
    """

    tensor: str
    axis: Count
    role: Role
    removed: tuple[Count, ...]

    @field_validator("removed")
    @classmethod
    def _is_ascending(cls, removed: tuple[int, ...]) -> tuple[int, ...]:
        return _ascending(removed)


class GroupDecision(Record):
    """What one group loses.

    Attributes:
        name: The group's name in the graph.
        size: Number of units before.
        removed: Units that go, ascending.
        slices: What that means for every tensor axis the units touch.
        exact: False if an operator mixes the units, so that removing some changes the others.
    """

    name: str
    size: Annotated[int, Field(ge=1, le=1 << 24)]
    exact: bool = True
    removed: tuple[Count, ...]
    slices: tuple[SliceDecision, ...]

    @classmethod
    def of(cls, group: Group, keep: NDArray[np.bool_] | None) -> GroupDecision:
        """Keep the units where `keep` [group.size] is True; None keeps all."""
        if keep is None:
            keep = np.ones(group.size, dtype=np.bool_)
        return cls(
            name=group.name,
            size=group.size,
            exact=group.exact,
            removed=tuple(np.flatnonzero(~keep).tolist()),
            slices=tuple(
                SliceDecision(
                    tensor=s.tensor, axis=s.axis, role=s.role, removed=tuple(s.removed(keep).tolist())
                )
                for s in group.slices
            ),
        )

    @field_validator("removed")
    @classmethod
    def _is_ascending(cls, removed: tuple[int, ...]) -> tuple[int, ...]:
        return _ascending(removed)

    @model_validator(mode="after")
    def _is_consistent(self) -> GroupDecision:
        if self.removed and self.removed[-1] >= self.size:
            raise ValueError(f"expected units below the size {self.size}, got {self.removed[-1]}")
        if len(self.removed) == self.size:
            raise ValueError(f"expected at least one unit kept, got all {self.size} removed")
        if not self.removed and any(s.removed for s in self.slices):
            raise ValueError("expected no position to go where no unit goes")
        return self

    @property
    def keep(self) -> NDArray[np.bool_]:
        """True for each unit that stays, [size]."""
        keep = np.ones(self.size, dtype=np.bool_)
        keep[list(self.removed)] = False
        return keep

    @property
    def kept(self) -> int:
        """Number of units that stay."""
        return self.size - len(self.removed)

    @property
    def ratio(self) -> float:
        """Fraction of the units that go, in [0, 1)."""
        return len(self.removed) / self.size


def _ascending(values: tuple[int, ...]) -> tuple[int, ...]:
    if any(a >= b for a, b in pairwise(values)):
        raise ValueError("expected indices in ascending order, each once")
    return values


def mask_of(name: str, mask: NDArray[np.bool_], sizes: Mapping[str, int]) -> NDArray[np.bool_]:
    """The mask, once it is known to fit the group of this name.

    Args:
        name: Of the group.
        mask: True for each unit that stays. [units]
        sizes: The number of units of every group.

    Raises:
        PlanError: There is no such group, or the mask is not boolean, has another length or keeps nothing.
    """
    where = f"plan: group {name!r}"
    if name not in sizes:
        raise PlanError(
            f"{where}: expected a group of the graph, got an unknown name. Take names from graph.groups."
        )
    mask = np.asarray(mask)
    if mask.dtype != np.bool_ or mask.shape != (sizes[name],):
        raise PlanError(
            f"{where}: expected a boolean mask of shape ({sizes[name]},), got {mask.dtype} of shape "
            f"{mask.shape}. Pass True for each unit that stays."
        )
    if not mask.any():
        raise PlanError(f"{where}: expected at least one unit kept, got none. Keep one.")
    return mask
