"""Which column goes to which row, one each, so that the sum is largest."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def best_assignment(values: NDArray[np.float64]) -> NDArray[np.int64]:
    """The column of each row, each column once, with the largest sum of values.

    By shortest augmenting paths: rows come one after the other, and the prices of rows and columns show how
    to make room for the next one. Time grows with the cube of the size.

    Args:
        values: Finite numbers. [n, n]

    Example:
        >>> best_assignment(np.array([[3.0, 2.0], [2.0, 0.0]]))
        array([1, 0])
    """
    cost = -np.asarray(values, dtype=np.float64)
    size = len(cost)
    row_price, column_price = np.zeros(size), np.zeros(size)
    row_of = np.full(size, -1)
    for start in range(size):
        shortest, before = np.full(size, np.inf), np.full(size, -1)
        done = np.zeros(size, dtype=bool)
        row, column = start, -1
        while row >= 0:
            if column >= 0:
                done[column] = True
            reduced = cost[row] - row_price[row] - column_price
            nearer = ~done & (reduced < shortest)
            shortest[nearer], before[nearer] = reduced[nearer], column
            following = int(np.where(done, np.inf, shortest).argmin())
            step = shortest[following]
            row_price[start] += step
            row_price[row_of[done]] += step
            column_price[done] -= step
            shortest[~done] -= step
            column, row = following, int(row_of[following])
        while column >= 0:  # each column on the path goes to the row of the one before it
            previous = int(before[column])
            row_of[column] = start if previous < 0 else row_of[previous]
            column = previous
    return np.argsort(row_of)
