"""How many units a group loses as a rule's knob turns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Staircase:
    """How many units one group loses as the knob turns.

    Below ``knob[0]`` it loses none; from ``knob[j]`` on, the first ``count[j]`` units of `order`.

    Attributes:
        order: The units in the order in which they go. [group.size]
        knob: Values of the knob at which the count changes, strictly ascending. [stairs]
        count: Units gone from there on, never falling. [stairs]
    """

    order: NDArray[np.int64]
    knob: NDArray[np.float64]
    count: NDArray[np.int64]

    @classmethod
    def of(cls, order: NDArray[np.int64], knob: NDArray[np.float64]) -> Staircase:
        """The first units of an order go one after the other at these values of the knob, which never fall.

        Example:
            >>> found = Staircase.of(np.array([2, 0, 1]), np.array([0.5, 0.5]))
            >>> found.knob.tolist(), found.count.tolist()
            ([0.5], [2])
        """
        last = np.flatnonzero(np.append(knob[1:] > knob[:-1], np.ones(min(1, len(knob)), dtype=np.bool_)))
        return cls(order, knob[last], last + 1)

    def removed(self, knob: float | None) -> int:
        """How many units are gone at this value of the knob; None: the knob is off, nothing goes."""
        stair = 0 if knob is None else int(np.searchsorted(self.knob, knob, side="right"))
        return int(self.count[stair - 1]) if stair else 0

    def went(self, count: int) -> tuple[float, float]:
        """When the unit at place `count`, 1 to the last of the stairs, goes: a pair that never falls.

        The value of the knob, and how far up in the stair of that value the unit is, in (0, 1]: units that
        go at one value are taken to go evenly, one after the other.
        """
        stair = int(np.searchsorted(self.count, count))
        below = int(self.count[stair - 1]) if stair else 0
        return float(self.knob[stair]), (count - below) / (int(self.count[stair]) - below)


def masks(steps: Mapping[str, Staircase], removed: Mapping[str, int]) -> dict[str, NDArray[np.bool_]]:
    """Per group, True for each unit that stays when the first `removed` go. [group.size]"""
    found: dict[str, NDArray[np.bool_]] = {}
    for name, stairs in steps.items():
        found[name] = np.ones(len(stairs.order), dtype=np.bool_)
        found[name][stairs.order[: removed[name]]] = False
    return found
