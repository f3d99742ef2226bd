"""The order of scores, with one answer to ties."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def ascending(scores: NDArray[np.float64]) -> NDArray[np.int64]:
    """The indices from the lowest score to the highest; among equal scores the highest index comes first.

    So whoever removes from the front keeps the lowest index of a tie, and removing more never brings
    a unit back.

    Args:
        scores: Higher is worth more. [n]

    Returns:
        A permutation of the indices. [n]

    Example:
        >>> ascending(np.array([2.0, 1.0, 1.0, 3.0])).tolist()
        [2, 1, 0, 3]
    """
    last = len(scores) - 1
    # A stable sort of the reversed vector meets the higher index of a tie first.
    return last - np.argsort(np.asarray(scores)[::-1], kind="stable")


def ranks(scores: NDArray[np.float64]) -> NDArray[np.int64]:
    """Each entry's place in `ascending`, 0 for the first to go, [n].

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
