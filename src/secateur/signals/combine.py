"""How the scores of coupled parts become the score of one unit.

A unit can have several *members*: the layers whose outputs are added to one residual stream, the halves of a
gated layer, the positions of a flattened map or a head, the tensors that produce, scale and consume it. They
can only be removed together, so they share one score:

- *weights* (`Magnitude`, `GeometricMedian`): a member is a tensor. Tensors differ in scale, so each is first
  divided by its mean over the group's units; then they are combined as the signal's ``combine`` says.
- *activations* (`Activation`, `APoZ`, `Rank`) and *scales* (`BatchNormScale`): a member is one place where
  the unit shows, one entry of one site or tensor. They are combined as they are, for what is added to one
  stream is measured in that stream's own scale.
- *distances* (`Wasserstein`): the largest member, since a unit is useful if anything it carries is.
- *first derivatives* (`Taylor`, `TaylorSample`, `Fisher`): the members are added up with their signs, before
  the absolute value or the square, because that sum is the derivative of removing all of them at once.
  `Snip` takes absolute values weight by weight, as it is defined, and adds those up.
- *errors of the layers that read the unit* (`Reconstruction`, `Fluctuation`) and weights one by one (`Wanda`)
  are added up.

The units of one group have the same members, so ``sum`` and ``mean`` rank them alike; they differ only where
groups are compared with each other. ``max`` can rank them differently. Each signal's default is what led on a
ResNet-20 whose residual streams are pruned too (``python -m benchmarks.bench_signals``): the largest member
for `Activation` and `Wasserstein`, the mean for the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from secateur.errors import SettingError
from secateur.signals.signal import Signal

Combine = Literal["sum", "mean", "max"]
"""How to combine the scores of a unit's members."""


def combined(
    scores: Sequence[NDArray[np.float64]], units: Sequence[NDArray[np.int64]], size: int, how: Combine
) -> NDArray[np.float64]:
    """Combine the scores of members to one score for each unit.

    Args:
        scores: Of the members, in any number of parts. [members] each
        units: Whose member each is. [members] each
        size: Number of units.
        how: ``sum``, ``mean`` or ``max`` over the members of each unit.

    Returns:
        [size]; 0 for a unit without members.

    Example:
        >>> conv, gate = np.array([1.0, 5.0, 2.0]), np.array([3.0, 4.0])
        >>> combined([conv, gate], [np.array([0, 1, 2]), np.array([0, 1])], 3, "mean")
        array([2. , 4.5, 2. ])
        >>> combined([conv, gate], [np.array([0, 1, 2]), np.array([0, 1])], 3, "max")
        array([3., 5., 2.])
    """
    score = np.concatenate([np.zeros(0), *scores])
    unit = np.concatenate([np.zeros(0, dtype=np.int64), *units])
    members = np.bincount(unit, minlength=size)
    if how == "max":
        best = np.full(size, -np.inf)
        np.maximum.at(best, unit, score)
        return np.where(members > 0, best, 0.0)
    total: NDArray[np.float64] = np.bincount(unit, weights=score, minlength=size).astype(np.float64)
    return total / np.maximum(members, 1) if how == "mean" else total


class Combined(Signal):
    """A signal whose setting `combine` says how the scores of a unit's members become one.

    A subclass declares it as its last field, with its own default.
    """

    combine: Combine

    def __post_init__(self) -> None:
        """Check `combine`."""
        if self.combine not in get_args(Combine):
            raise SettingError(
                f"{self.name}: expected combine to be one of {', '.join(get_args(Combine))}, got "
                f"{self.combine!r}. Name one."
            )
