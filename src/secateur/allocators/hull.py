"""Lower convex hulls of measured curves."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def lower_hull(
    x: NDArray[np.float64], y: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The corners of the lower convex hull of the points (x, y), where x is ascending.

    Example:
        >>> x, y = lower_hull(np.arange(4.0), np.array([0.0, 2.0, 1.0, 3.0]))
        >>> x.tolist(), y.tolist()
        ([0.0, 2.0, 3.0], [0.0, 1.0, 3.0])
    """
    kept: list[int] = []
    for k in range(len(x)):
        while len(kept) > 1:
            a, b = kept[-2:]
            if (y[b] - y[a]) * (x[k] - x[a]) < (y[k] - y[a]) * (x[b] - x[a]):
                break
            kept.pop()
        kept.append(k)
    return x[kept], y[kept]


def slopes(y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Slopes of the lower hull of a curve with values y at 0, 1, 2, …. They never fall. [len(y) - 1]

    Example:
        >>> slopes(np.array([0.0, 2.0, 1.0, 3.0])).tolist()
        [0.5, 0.5, 2.0]
    """
    at, height = lower_hull(np.arange(float(len(y))), y)
    width = np.diff(at)
    return np.repeat(np.diff(height) / width, width.astype(np.int64))
