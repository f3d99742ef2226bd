"""Sort scores, with one fixed rule for equal scores: the lowest index is kept longest."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def ascending(scores: NDArray[np.float64]) -> NDArray[np.int64]:
    """Indices sorted from the lowest to the highest score; of equal scores, the highest index comes first.

    Units are removed from the front of this order. So of equal scores the lowest index is kept longest, and
    removing more units never puts a unit back.

    Args:
        scores: Higher is worth more. [n]

    Returns:
        A permutation of the indices. [n]

    Example:
        >>> ascending(np.array([2.0, 1.0, 1.0, 3.0])).tolist()
        [2, 1, 0, 3]
    """
    last = len(scores) - 1
    # In the reversed vector, a higher index comes earlier, so a stable sort puts it first among equal scores.
    return last - np.argsort(np.asarray(scores)[::-1], kind="stable")


def ranks(scores: NDArray[np.float64]) -> NDArray[np.int64]:
    """Position of each entry in the order of `ascending`: 0 for the unit that is removed first. [n]

    Example:
        >>> ranks(np.array([2.0, 1.0, 1.0, 3.0])).tolist()
        [2, 1, 0, 3]
        >>> ranks(np.array([5.0, 9.0, 1.0])).tolist()
        [1, 2, 0]
    """
    order = ascending(scores)
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return place
