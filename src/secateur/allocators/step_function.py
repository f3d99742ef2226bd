"""Step functions: the number of units that a group loses at each value of an allocator's knob."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from secateur.allocators.ranking import ascending
from secateur.graph.groups import Group


@dataclass(frozen=True, eq=False)
class StepFunction:
    """The number of units that one group loses at each value of the knob.

    Below ``knob[0]`` the group loses nothing. From ``knob[j]`` on, it loses the first ``count[j]`` units of
    `order`.

    Attributes:
        order: All units in their order of removal. [group.size]
        knob: Values of the knob at which the number changes, strictly ascending. [steps]
        count: Number of removed units from that value on, never falling. [steps]
    """

    order: NDArray[np.int64]
    knob: NDArray[np.float64]
    count: NDArray[np.int64]

    @classmethod
    def of(cls, order: NDArray[np.int64], knob: NDArray[np.float64]) -> StepFunction:
        """Make a step function from one value of the knob for each removed unit.

        Args:
            order: All units in their order of removal. [group.size]
            knob: Value at which each of the first units is removed, never falling. [removable units]

        Example:
            >>> found = StepFunction.of(np.array([2, 0, 1]), np.array([0.5, 0.5]))
            >>> found.knob.tolist(), found.count.tolist()
            ([0.5], [2])
        """
        last = np.flatnonzero(np.append(knob[1:] > knob[:-1], np.ones(min(1, len(knob)), dtype=np.bool_)))
        return cls(order, knob[last], last + 1)

    def removed(self, knob: float | None) -> int:
        """Number of removed units at a value of the knob; 0 for None."""
        step = 0 if knob is None else int(np.searchsorted(self.knob, knob, side="right"))
        return int(self.count[step - 1]) if step else 0

    def went(self, count: int) -> tuple[float, float]:
        """When a unit is removed, as a pair that can be compared between groups.

        Args:
            count: Position of the unit in the removal order, from 1.

        Returns:
            The value of the knob, and the position of the unit within the step of this value, in (0, 1]. A
            step that removes several units is treated as if it removed them evenly, one after another.
        """
        step = int(np.searchsorted(self.count, count))
        below = int(self.count[step - 1]) if step else 0
        return float(self.knob[step]), (count - below) / (int(self.count[step]) - below)


def masks(steps: Mapping[str, StepFunction], removed: Mapping[str, int]) -> dict[str, NDArray[np.bool_]]:
    """Masks for given numbers of removed units: True for units that stay. [group.size] for each group."""
    found: dict[str, NDArray[np.bool_]] = {}
    for name, function in steps.items():
        found[name] = np.ones(len(function.order), dtype=np.bool_)
        found[name][function.order[: removed[name]]] = False
    return found


def step_function(points: NDArray[np.float64]) -> StepFunction:
    """Make the step function of a group from the value of the knob at which each unit is removed.

    Args:
        points: The value for each unit; infinity if it is never removed. Of units with the same value, the
            one with the highest index is removed first. [group.size]

    Example:
        >>> found = step_function(np.array([0.5, np.inf, 0.1, 0.5]))
        >>> found.order.tolist(), found.knob.tolist(), found.count.tolist()
        ([2, 3, 0, 1], [0.1, 0.5], [1, 3])
    """
    order = ascending(points)
    return StepFunction.of(order, points[order][: int((points < np.inf).sum())])


def split(values: NDArray[np.float64], groups: Sequence[Group]) -> Mapping[str, NDArray[np.float64]]:
    """Cut one vector over the units of all groups into one vector for each group."""
    ends = np.cumsum([group.size for group in groups])[:-1]
    return {g.name: part for g, part in zip(groups, np.split(values, ends), strict=True)}
