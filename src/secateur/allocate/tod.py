"""Tolerance of Difference: each group loses as much as two signals agree on.

Source: Lin et al. 2025, FAIR-Pruner, arXiv 2508.02291.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from secateur.allocate.base import Allocator, Staircase
from secateur.allocate.budget import Budget
from secateur.allocate.checks import fraction
from secateur.allocate.limits import Limits
from secateur.allocate.ranking import ascending, ranks
from secateur.allocate.signals import ScoreTable, vector
from secateur.errors import ScoreError

if TYPE_CHECKING:
    from secateur.graph.graph import Graph


def overlap_curve(removal: NDArray[np.float64], protection: NDArray[np.float64]) -> NDArray[np.int64]:
    """How many of the k first to go are among the k most protected, for k = 1 ... N, [N].

    With rU the rank by removal and rR the rank by protection (0 smallest), unit i is among the k first
    to go from k = rU + 1 on and among the k most protected from k = N - rR on. It enters the overlap
    at the larger of the two and never leaves it, so one histogram and its running sum are all of it.
    O(N log N), for the sorting.
    """
    removal, protection = np.asarray(removal), np.asarray(protection)
    if removal.ndim != 1 or removal.shape != protection.shape:
        raise ScoreError(
            f"ToD: expected two score vectors of one length, got {removal.shape} and {protection.shape}. "
            "Pass one score per unit for each signal."
        )
    size = len(removal)
    enters = np.maximum(ranks(removal) + 1, size - ranks(protection))
    return np.cumsum(np.bincount(enters, minlength=size + 1))[1:]


def tolerance_curve(removal: NDArray[np.float64], protection: NDArray[np.float64]) -> NDArray[np.float64]:
    """ToD(k) for k = 1 ... N: the share of the k first to go that are among the k most protected.

    ``ToD(k) = |{rU < k} ∩ {rR >= N - k}| / k``, in [0, 1]; 0: the signals agree that these k can go.
    It is not monotone in k. Source: Lin et al. 2025, ToD.

    Args:
        removal: Lowest goes first. [N]
        protection: Highest is most protected. [N]

    Returns:
        ToD(k) at index k - 1. [N]

    Raises:
        ScoreError: The vectors are not two of one length.

    Example:
        >>> tolerance_curve(np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 9.0, 2.0, 5.0])).tolist()
        [0.0, 0.5, 0.6666666666666666, 1.0]
    """
    overlap = overlap_curve(removal, protection)
    return overlap / np.arange(1, len(overlap) + 1)


@dataclass(frozen=True)
class ToD(Allocator):
    """Each group loses the largest k with ToD(k) <= tolerance, one tolerance for all groups.

    A group whose two signals agree loses much, one in which they contradict each other loses little.
    With a budget the tolerance is solved: the values of ToD that occur are the steps, and `tolerance`
    is not used. Under `Limits` only the allowed k are looked at, so the tolerance holds for what is
    in fact removed.

    Only the ranks matter, so any strictly increasing transform of a signal gives the same plan. Among
    equal scores the lowest index is kept and counts as the more protected, in both rankings. So where
    both signals are constant in a group, as wherever they rank alike, nothing contradicts the removal
    of half of it, and it loses ``floor(N / (2 - tolerance))`` units.

    Source: Lin et al. 2025, FAIR-Pruner, arXiv 2508.02291. Departure: the paper fixes a bound of
    0.99·N on k; here it is ``Limits.max_ratio``, with that default.

    Attributes:
        tolerance: α, in [0, 1].
        removal: Signal whose lowest scores go first.
        protection: Signal whose highest scores are to stay.

    Raises:
        SettingError: `tolerance` is out of range.
    """

    tolerance: float = 0.1
    removal: str = "wasserstein"
    protection: str = "taylor"
    name: ClassVar[str] = "tod"

    def __post_init__(self) -> None:
        """Checks the values."""
        object.__setattr__(self, "tolerance", fraction("ToD", "tolerance", self.tolerance, one=True))

    @property
    def signals(self) -> tuple[str, ...]:
        """The removal and the protection signal."""
        return (self.removal,) if self.removal == self.protection else (self.removal, self.protection)

    def knob(self, budget: Budget | None) -> float | None:
        """The tolerance."""
        return self.tolerance

    def settings(self, knob: float | None) -> dict[str, JsonValue]:
        """The tolerance that decided, and the two signals."""
        tolerance = None if knob is None else float(knob)
        return {"tolerance": tolerance, "removal": self.removal, "protection": self.protection}

    def steps(self, graph: Graph, scores: ScoreTable, limits: Limits) -> Mapping[str, Staircase]:
        """k(α), the largest allowed k with ToD(k) <= α: never falling in α, though ToD(k) is not in k."""
        found: dict[str, Staircase] = {}
        for group in limits.considered(graph.groups):
            removal = vector(scores, self.removal, group)
            allowed = limits.feasible(group.size)
            values = tolerance_curve(removal, vector(scores, self.protection, group))[allowed - 1]
            # A k is the largest for some α if and only if its ToD is below that of every larger k.
            later = np.minimum.accumulate(np.append(values, np.inf)[::-1])[::-1][1:]
            stairs = values < later
            found[group.name] = Staircase(ascending(removal), knob=values[stairs], count=allowed[stairs])
        return found

    def certificates(
        self, graph: Graph, scores: ScoreTable, limits: Limits, removed: Mapping[str, int], knob: float | None
    ) -> dict[str, JsonValue]:
        """The tolerance, and for each group what it bounds and what happened; see `group_certificate`."""
        groups: dict[str, JsonValue] = {
            group.name: group_certificate(
                vector(scores, self.removal, group),
                vector(scores, self.protection, group),
                removed[group.name],
                0.0 if knob is None else float(knob),
            )
            for group in limits.considered(graph.groups)
        }
        return {"tolerance": None if knob is None else float(knob), "groups": groups}


def group_certificate(
    removal: NDArray[np.float64], protection: NDArray[np.float64], k: int, tolerance: float
) -> dict[str, JsonValue]:
    """What the tolerance guarantees about one group that loses its k first, and what happened.

    ToD(k) <= α says that at most m = floor(α·k) of the removed units are among the k most protected.
    With the protection scores in descending order p_1 >= p_2 >= ... and P their sum:

    - high-protection mass: the removed units among the k most protected carry at most p_1 + ... + p_m;
    - all mass: the other removed units are at best those that follow the k most protected, so the
      removed units carry at most (p_1 + ... + p_m) + (p_{k+1} + ... + p_{2k-m}). There are that many: of k
      units at least 2k - N are among the k most protected, hence m >= 2k - N.

    The bounds hold with equality for some rankings and assume nothing but the tolerance.

    Args:
        removal: Lowest goes first. [N]
        protection: Highest is most protected. [N]
        k: Number of units removed, 0 or one with ToD(k) <= `tolerance`.
        tolerance: α.

    Returns:
        ``removed`` (k), ``tod``; ``overlap`` and ``overlap_bound`` in units; ``high_mass``,
        ``high_mass_bound``, ``mass`` and ``mass_bound`` as shares of P, which are None where shares
        have no meaning: a score is negative, or all are zero.
    """
    overlap = int(overlap_curve(removal, protection)[k - 1]) if k else 0
    bound = _most(tolerance, k)
    found: dict[str, JsonValue] = {
        "removed": k,
        "tod": overlap / k if k else 0.0,
        "overlap": overlap,
        "overlap_bound": bound,
        "high_mass": None,
        "high_mass_bound": None,
        "mass": None,
        "mass_bound": None,
    }
    top = float(protection.max())
    if protection.min() >= 0 and top > 0:
        scaled = protection / top  # so that no sum overflows
        down = ascending(protection)[::-1]
        gone = ascending(removal)[:k]
        high = np.intersect1d(gone, down[:k])
        # Correctly rounded sums keep the order of the exact ones: no bound fails by rounding alone.
        total = math.fsum(scaled)
        found["high_mass"] = math.fsum(scaled[high]) / total
        found["high_mass_bound"] = math.fsum(scaled[down[:bound]]) / total
        found["mass"] = math.fsum(scaled[gone]) / total
        found["mass_bound"] = math.fsum(scaled[np.append(down[:bound], down[k : 2 * k - bound])]) / total
    return found


def _most(tolerance: float, k: int) -> int:
    """The largest m with m / k <= tolerance: the floor of tolerance·k, compared as ToD is."""
    m = min(k, math.floor(tolerance * k) + 1)
    while m > 0 and m / k > tolerance:
        m -= 1
    return m
