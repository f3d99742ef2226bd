"""How many units a group loses as a rule's knob turns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from secateur.allocate.ranking import ascending
from secateur.graph.groups import Group


@dataclass(frozen=True, eq=False)
class StepFunction:
    """How many units one group loses as the knob turns.

    Below ``knob[0]`` it loses none; from ``knob[j]`` on, the first ``count[j]`` units of `order`.

    Attributes:
        order: The units in the order in which they go. [group.size]
        knob: Values of the knob at which the count changes, strictly ascending. [steps]
        count: Units gone from there on, never falling. [steps]
    """

    order: NDArray[np.int64]
    knob: NDArray[np.float64]
    count: NDArray[np.int64]

    @classmethod
    def of(cls, order: NDArray[np.int64], knob: NDArray[np.float64]) -> StepFunction:
        """The first units of an order go one after the other at these values of the knob, which never fall.

        Example:
            >>> found = StepFunction.of(np.array([2, 0, 1]), np.array([0.5, 0.5]))
            >>> found.knob.tolist(), found.count.tolist()
            ([0.5], [2])
        """
        last = np.flatnonzero(np.append(knob[1:] > knob[:-1], np.ones(min(1, len(knob)), dtype=np.bool_)))
        return cls(order, knob[last], last + 1)

    def removed(self, knob: float | None) -> int:
        """How many units are gone at this value of the knob; None: the knob is off, nothing goes."""
        step = 0 if knob is None else int(np.searchsorted(self.knob, knob, side="right"))
        return int(self.count[step - 1]) if step else 0

    def went(self, count: int) -> tuple[float, float]:
        """When the unit at place `count`, 1 to the last of the steps, goes: a pair that never falls.

        The value of the knob, and how far up in the step of that value the unit is, in (0, 1]: units that
        go at one value are taken to go evenly, one after the other.
        """
        step = int(np.searchsorted(self.count, count))
        below = int(self.count[step - 1]) if step else 0
        return float(self.knob[step]), (count - below) / (int(self.count[step]) - below)


def masks(steps: Mapping[str, StepFunction], removed: Mapping[str, int]) -> dict[str, NDArray[np.bool_]]:
    """Per group, True for each unit that stays when the first `removed` go. [group.size]"""
    found: dict[str, NDArray[np.bool_]] = {}
    for name, function in steps.items():
        found[name] = np.ones(len(function.order), dtype=np.bool_)
        found[name][function.order[: removed[name]]] = False
    return found


def step_function(leaves: NDArray[np.float64]) -> StepFunction:
    """The step function of a group whose unit i goes from knob ``leaves[i]`` on. [group.size]

    Where that is infinite, the unit never goes. Of units that go at one value, the highest index is first.

    Example:
        >>> found = step_function(np.array([0.5, np.inf, 0.1, 0.5]))
        >>> found.order.tolist(), found.knob.tolist(), found.count.tolist()
        ([2, 3, 0, 1], [0.1, 0.5], [1, 3])
    """
    order = ascending(leaves)
    return StepFunction.of(order, leaves[order][: int((leaves < np.inf).sum())])


def split(values: NDArray[np.float64], groups: Sequence[Group]) -> Mapping[str, NDArray[np.float64]]:
    """One vector over the units of all groups, cut into those of each."""
    ends = np.cumsum([group.size for group in groups])[:-1]
    return {g.name: part for g, part in zip(groups, np.split(values, ends), strict=True)}
