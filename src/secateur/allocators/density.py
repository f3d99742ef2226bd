"""Step functions for allocators that set a density, the kept fraction, for each group."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from secateur.allocators.ranking import ascending
from secateur.allocators.step_function import StepFunction


def by_density(
    values: Mapping[str, NDArray[np.float64]],
    knob: Callable[[str, NDArray[np.float64]], NDArray[np.float64]],
) -> dict[str, StepFunction]:
    """Build the step functions of an allocator whose densities fall as its knob rises.

    A group of N units loses its k lowest-scored units at the value of the knob where its density falls to 1 −
    k / N.

    Args:
        values: Scores of each group. [group.size]
        knob: Function (group name, densities in [0, 1), descending) -> value of the knob at which the group's
            density falls to each of them. The values ascend; infinity means never.
    """
    found = {}
    for name, scores in values.items():
        size = len(scores)
        count = np.arange(1, size, dtype=np.int64)  # one unit stays
        at = knob(name, 1 - count / size)
        count, at = count[np.isfinite(at)], at[np.isfinite(at)]
        # Of several counts at the same value of the knob, only the largest is a step.
        last = np.append(at[1:] > at[:-1], np.ones(min(1, len(at)), dtype=np.bool_))
        found[name] = StepFunction(ascending(scores), at[last], count[last])
    return found
