"""Rules that give each group a density, the fraction kept, as a function of the knob."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from secateur.allocate.ranking import ascending
from secateur.allocate.step_function import StepFunction


def by_density(
    values: Mapping[str, NDArray[np.float64]],
    knob: Callable[[str, NDArray[np.float64]], NDArray[np.float64]],
) -> dict[str, StepFunction]:
    """The step functions of a rule whose density falls as its knob rises.

    k of a group's N units, those with the lowest scores, are gone where the density is at most 1 − k / N.

    Args:
        values: Per group its scores. [group.size]
        knob: (group, densities in [0, 1), descending) -> the value of the knob at which the group's density
            falls to each; ascending, infinity where it never does.
    """
    found = {}
    for name, scores in values.items():
        size = len(scores)
        count = np.arange(1, size, dtype=np.int64)  # one unit stays
        at = knob(name, 1 - count / size)
        count, at = count[np.isfinite(at)], at[np.isfinite(at)]
        last = np.append(at[1:] > at[:-1], np.ones(min(1, len(at)), dtype=np.bool_))
        found[name] = StepFunction(ascending(scores), at[last], count[last])
    return found
