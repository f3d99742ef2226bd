"""Rules that say of each unit at which value of the knob it goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from secateur.allocate.ranking import ascending
from secateur.allocate.staircase import Staircase
from secateur.graph.groups import Group


def staircase(leaves: NDArray[np.float64]) -> Staircase:
    """The staircase of a group whose unit i goes from knob ``leaves[i]`` on; infinity: never. [group.size]

    Of units that go at one value, the highest index is first.

    Example:
        >>> found = staircase(np.array([0.5, np.inf, 0.1, 0.5]))
        >>> found.order.tolist(), found.knob.tolist(), found.count.tolist()
        ([2, 3, 0, 1], [0.1, 0.5], [1, 3])
    """
    order = ascending(leaves)
    return Staircase.of(order, leaves[order][: int((leaves < np.inf).sum())])


def split(values: NDArray[np.float64], groups: Sequence[Group]) -> Mapping[str, NDArray[np.float64]]:
    """One vector over the units of all groups, cut into those of each."""
    ends = np.cumsum([group.size for group in groups])[:-1]
    return {g.name: part for g, part in zip(groups, np.split(values, ends), strict=True)}
