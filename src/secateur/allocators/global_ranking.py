"""Rank the units of the whole model together, and remove the lowest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from secateur.allocators.base import Allocator
from secateur.allocators.budget import Budget
from secateur.allocators.checks import fraction
from secateur.allocators.limits import Limits
from secateur.allocators.ranking import ascending, ranks
from secateur.allocators.signals import ScoreTable, vector
from secateur.allocators.step_function import StepFunction, split, step_function
from secateur.errors import ScoreError, SettingError
from secateur.signals.units.combination import SignalLike, name_of

if TYPE_CHECKING:
    from secateur.graph.graph import Graph

Vector = NDArray[np.float64]


def lamp(scores: Vector) -> Vector:
    """Divide the square of each score by the sum of the squares of this and all larger scores of the group.

    The largest score of a group becomes 1. Of equal scores, the one with the lowest index counts as the
    largest.

    Args:
        scores: Scores of one group. [group.size]

    Returns:
        Values in [0, 1]. [group.size]

    Source: Lee et al. 2021, Layer-adaptive Sparsity for the Magnitude-based Pruning, arXiv 2010.07611.

    Example:
        >>> lamp(np.array([2.0, 1.0, 2.0])).tolist()
        [1.0, 0.1111111111111111, 0.5]
    """
    order = ascending(scores)
    top = float(np.abs(scores).max())
    squares = np.square(scores[order] / (top or 1.0))
    sums = np.cumsum(squares[::-1])[::-1]
    found = np.empty(len(scores))
    found[order] = squares / np.where(sums > 0, sums, 1.0)
    return found


def _by_mean(scores: Vector) -> Vector:
    return _divided(scores, float(scores.mean()))


def _by_max(scores: Vector) -> Vector:
    return _divided(scores, float(scores.max()))


def zscore(scores: Vector) -> Vector:
    """Subtract the mean of a group's scores, and divide by their standard deviation.

    Equal scores become zeros: of such a group no unit stands out.

    Args:
        scores: Scores of one group, of any sign. [group.size]

    Returns:
        Values with mean 0 and mean square 1. [group.size]

    Source: An et al. 2023, Fluctuation-based Adaptive Structured Pruning (FLAP), arXiv 2312.11983.

    Example:
        >>> zscore(np.array([1.0, 3.0, 1.0, 3.0])).tolist()
        [-1.0, 1.0, -1.0, 1.0]
    """
    centred = scores - scores.mean()
    spread = float(np.sqrt(np.square(centred).mean()))
    # Rounding leaves equal scores a spread of about an epsilon of their size.
    equal = spread <= 8 * np.finfo(np.float64).eps * float(np.abs(scores).max())
    return np.zeros(len(scores)) if equal else centred / spread


def _divided(scores: Vector, whole: float) -> Vector:
    return scores / whole if whole > 0 else np.zeros(len(scores))


NORMALISE: Mapping[str, Callable[[Vector], Vector]] = MappingProxyType(
    {"none": lambda scores: scores, "mean": _by_mean, "max": _by_max, "zscore": zscore, "lamp": lamp}
)
"""Functions that make the scores of one group comparable with those of other groups, by name."""


@dataclass(frozen=True)
class Global(Allocator):
    """Removes the units with the lowest scores of the whole model, with one threshold for all groups.

    With a budget, the threshold is solved. Of equal scores, the unit of the earlier group is kept, and within
    a group the one with the lower index. Units that `Limits` protects stay; other units are not removed in
    their place, except to meet a budget.

    Attributes:
        ratio: Fraction of all units to remove, in [0, 1). None if a budget decides.
        normalise: How scores of different groups are made comparable. ``mean`` and ``max`` divide by the mean
            or the largest score of the group. ``zscore`` subtracts the mean and divides by the standard
            deviation; with the signal ``fluctuation`` that is the rule of FLAP (An et al. 2023, arXiv
            2312.11983), which goes by the name ``"flap"``. ``lamp`` divides by the sum
            over larger scores (see `LAMP`). ``none`` changes nothing; use it for signals that already have
            one unit for all groups, such as ``taylor``.
        removal: Signal whose lowest scores are removed first: a name such as ``"l1*wasserstein"``, or an
            instance.

    Raises:
        SettingError: A setting is none of these; on `allocate`, both or neither of ratio and budget is given.
        ScoreError: On `allocate`, scores that are to be divided are negative.

    Example:
        >>> import numpy as np
        >>> import torch
        >>> import secateur as sc
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 3), torch.nn.Linear(3, 2))
        >>> graph = sc.trace(net, torch.zeros(2, 2))
        >>> scores = {"magnitude": {"0": np.array([1.0, 9, 9]), "1": np.array([2.0, 3, 9])}}
        >>> plan = sc.Global(normalise="none").allocate(graph, scores, sc.Budget(macs=0.6))
        >>> [(group.name, group.removed) for group in plan.groups]
        [('0', (0,)), ('1', (0,))]
    """

    ratio: float | None = None
    normalise: str = "mean"
    removal: SignalLike = "magnitude"
    name: ClassVar[str] = "global"
    solved: ClassVar[str] = "ratio"

    def __post_init__(self) -> None:
        """Check the values."""
        if self.ratio is not None:
            object.__setattr__(self, "ratio", fraction(type(self).__name__, "ratio", self.ratio))
        if self.normalise not in NORMALISE:
            raise SettingError(
                f"Global: expected normalise to be one of {', '.join(NORMALISE)}, got {self.normalise!r}. "
                "Name one of these."
            )

    @property
    def signals(self) -> tuple[SignalLike, ...]:
        """The removal signal."""
        return (self.removal,)

    def knob(self, budget: Budget | None) -> float | None:
        """The ratio."""
        if (self.ratio is None) == (budget is None):
            name, got = type(self).__name__, "neither" if budget is None else "both"
            raise SettingError(
                f"{name}: expected either a ratio or a budget, got {got}. "
                f"Write {name}(ratio=0.25), or {name}() with a budget."
            )
        return self.ratio

    def settings(self, knob: float | None) -> dict[str, JsonValue]:
        """The ratio that was used, the normalisation and the signal."""
        ratio = None if knob is None else float(knob)
        return {"ratio": ratio, "normalise": self.normalise, "removal": name_of(self.removal)}

    def steps(self, graph: Graph, scores: ScoreTable, limits: Limits) -> Mapping[str, StepFunction]:
        """The unit with ascending rank i among all N units is removed from ratio (i + 1) / N on."""
        groups = limits.considered(graph.groups)
        values = {g.name: vector(scores, self.removal, g) for g in groups}
        for name, found in values.items():
            if self.normalise not in ("none", "zscore") and found.min() < 0:
                raise ScoreError(
                    f"Global: expected scores of 0 or more to divide, got {found.min()} in {name!r}. "
                    'Use normalise="none".'
                )
        whole = np.concatenate([NORMALISE[self.normalise](found) for found in values.values()])
        points = split((ranks(whole) + 1) / len(whole), groups)
        return {name: step_function(found) for name, found in points.items()}
