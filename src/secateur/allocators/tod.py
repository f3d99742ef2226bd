"""Tolerance of Difference (ToD): each group loses as many units as two signals agree on.

Source: Lin et al. 2025, FAIR-Pruner, arXiv 2508.02291.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from secateur.allocators.base import Allocator
from secateur.allocators.budget import Budget
from secateur.allocators.checks import fraction
from secateur.allocators.decision import Decision
from secateur.allocators.description import Certificate
from secateur.allocators.exchange import cells, exchange, sentences
from secateur.allocators.limits import Limits
from secateur.allocators.naming import shorten
from secateur.allocators.ranking import ascending, ranks
from secateur.allocators.signals import ScoreTable, vector
from secateur.allocators.step_function import StepFunction
from secateur.allocators.uniform import Uniform
from secateur.common.formatting import share
from secateur.common.formatting import shorten as joined
from secateur.errors import ConstantScoresWarning, ScoreError
from secateur.signals.units.combination import SignalLike, name_of

if TYPE_CHECKING:
    from secateur.graph.graph import Graph


def overlap_curve(removal: NDArray[np.float64], protection: NDArray[np.float64]) -> NDArray[np.int64]:
    """For k = 1 ... N, count the units that are among the first k to remove and among the k most protected.

    Let rU be the rank of a unit by removal and rR its rank by protection, 0 for the smallest. The unit is
    among the first k to remove if k >= rU + 1, and among the k most protected if k >= N - rR. So it is in the
    overlap from the larger of these two numbers on. A histogram of these numbers and its running sum give the
    curve, in O(N log N).

    Args:
        removal: The lowest is removed first. [N]
        protection: The highest is most protected. [N]

    Returns:
        The count for k at index k - 1. [N]
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
    """ToD(k) for k = 1 ... N: the share of the first k units to remove that are among the k most protected.

    ``ToD(k) = |{rU < k} ∩ {rR >= N - k}| / k``, in [0, 1]. At 0 both signals agree that these k units can be
    removed. ToD is not monotone in k. Source: Lin et al. 2025, ToD.

    Args:
        removal: The lowest is removed first. [N]
        protection: The highest is most protected. [N]

    Returns:
        ToD(k) at index k - 1. [N]

    Raises:
        ScoreError: The two vectors do not have the same length.

    Example:
        >>> tolerance_curve(np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 9.0, 2.0, 5.0])).tolist()
        [0.0, 0.5, 0.6666666666666666, 1.0]
    """
    overlap = overlap_curve(removal, protection)
    return overlap / np.arange(1, len(overlap) + 1)


@dataclass(frozen=True)
class ToD(Allocator):
    """Removes from each group the largest number k of units with ToD(k) <= tolerance.

    The tolerance is the same for all groups. A group loses much if its two signals agree, and little if they
    contradict each other. With a budget, the tolerance is solved and `tolerance` is not used. Only numbers k
    that `Limits` allows are considered, so the tolerance holds for the units that are really removed.

    Only ranks matter: a strictly increasing transform of a signal gives the same plan. Of equal scores, the
    unit with the lowest index is removed last and is the most protected, in both rankings. If both signals
    rank the units in the same way, for example if both are constant, nothing contradicts the removal of half
    of the group: it loses ``floor(N / (2 - tolerance))`` units. If a group with constant scores loses units,
    there is a `ConstantScoresWarning`.

    Source: Lin et al. 2025, FAIR-Pruner, arXiv 2508.02291. Departure: the paper limits k to 0.99·N; here the
        limit is
    ``Limits.max_ratio``, with the same default.

    Attributes:
        tolerance: α, in [0, 1].
        removal: Signal whose lowest scores are removed first: a name such as ``"l1*wasserstein"``, or an
            instance.
        protection: Signal whose highest scores are protected.

    Raises:
        SettingError: `tolerance` is out of range.

    Example:
        >>> import torch
        >>> import secateur as sc
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> graph = sc.trace(net, torch.zeros(2, 4))
        >>> protection = np.array([1.0, 9, 2, 3, 8, 7, 6, 5])
        >>> scores = {"wasserstein": {"0": np.arange(8.0)}, "taylor": {"0": protection}}
        >>> sc.ToD(tolerance=0.0).allocate(graph, scores).groups[0].removed
        (0,)
        >>> sc.ToD(tolerance=0.34).allocate(graph, scores).groups[0].removed
        (0, 1, 2, 3)
    """

    tolerance: float = 0.1
    removal: SignalLike = "wasserstein"
    protection: SignalLike = "taylor"
    name: ClassVar[str] = "tod"
    solved: ClassVar[str] = "tolerance"
    on_weights: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the values."""
        object.__setattr__(self, "tolerance", fraction("ToD", "tolerance", self.tolerance, one=True))

    @property
    def signals(self) -> tuple[SignalLike, ...]:
        """The removal signal and the protection signal."""
        same = name_of(self.removal) == name_of(self.protection)
        return (self.removal,) if same else (self.removal, self.protection)

    def knob(self, budget: Budget | None) -> float | None:
        """The tolerance."""
        return self.tolerance

    def settings(self, knob: float | None) -> dict[str, JsonValue]:
        """The tolerance that was used, and the two signals."""
        tolerance = None if knob is None else float(knob)
        return {
            "tolerance": tolerance,
            "removal": name_of(self.removal),
            "protection": name_of(self.protection),
        }

    def steps(self, graph: Graph, scores: ScoreTable, limits: Limits) -> Mapping[str, StepFunction]:
        """The step function k(α): the largest allowed k with ToD(k) <= α. It never falls with α."""
        found: dict[str, StepFunction] = {}
        for group in limits.considered(graph.groups):
            removal = vector(scores, self.removal, group)
            allowed = limits.feasible(group.size)
            values = tolerance_curve(removal, vector(scores, self.protection, group))[allowed - 1]
            # k is the largest for some α exactly if ToD(k) is below ToD of every larger k.
            later = np.minimum.accumulate(np.append(values, np.inf)[::-1])[::-1][1:]
            changes = values < later
            found[group.name] = StepFunction(ascending(removal), knob=values[changes], count=allowed[changes])
        return found

    def certificates(
        self, graph: Graph, scores: ScoreTable, limits: Limits, decision: Decision
    ) -> dict[str, JsonValue]:
        """The bounds that the tolerance gives, the actual values, and a comparison with `Uniform`.

        Returns:
            ``tolerance``; ``groups``, the results of `group_certificate`; ``exchange``, the result of
            `exchange` with ``macs`` and ``params`` of both plans, or None if nothing is removed;
            ``constant``, for each group that loses units, the signals that have the same score for all its
            units.
        """
        considered = limits.considered(graph.groups)
        removal = {g.name: vector(scores, self.removal, g) for g in considered}
        protection = {g.name: vector(scores, self.protection, g) for g in considered}
        tolerance = None if decision.knob is None else float(decision.knob)
        groups: dict[str, JsonValue] = {
            name: group_certificate(
                removal[name],
                protection[name],
                decision.turned[name],
                tolerance or 0.0,
                removed=decision.removed[name],
            )
            for name in decision.steps
        }
        constant: dict[str, list[str]] = {}
        for signal, by_group in {
            name_of(self.removal): removal,
            name_of(self.protection): protection,
        }.items():
            for name, values in by_group.items():
                if decision.removed[name] and values.min() == values.max():
                    constant.setdefault(name, []).append(signal)
        if constant:
            _warn(constant)
        return {
            "tolerance": tolerance,
            "groups": groups,
            "exchange": self._exchange(graph, scores, limits, decision, protection),
            "constant": {name: list(signals) for name, signals in constant.items()},
        }

    def certificate(self, found: Mapping[str, Any]) -> Certificate:
        """Say how many protected units were removed, with the bound, and compare the plan with `Uniform`."""
        if not {"tolerance", "groups"} <= found.keys():
            return super().certificate(found)
        if found["tolerance"] is None:
            return Certificate(sentences=("Nothing had to go, so nothing is guaranteed.",))
        groups, tolerance = found["groups"], float(found["tolerance"])
        removed, overlap, bound = (
            sum(g[name] for g in groups.values()) for name in ("removed", "overlap", "overlap_bound")
        )
        rows = (
            f"Tolerance of Difference {tolerance:.4g}: of the k units that a layer lost, at most "
            f"{100 * tolerance:.3g} % are among the k of that layer that the protection signal values most.",
            f"Over all layers {removed:,} units went; {overlap:,} of them were among those, and "
            f"{bound:,} was the limit.",
        )
        exchanged = found.get("exchange") or {}
        compared = exchanged.get("groups", {})
        return Certificate(
            sentences=(
                *rows,
                *_given_back(groups),
                *(sentences(exchanged) if compared else ()),
                *_constant(found.get("constant") or {}),
            ),
            note=(
                "Score gone and at most are shares of a layer's whole protection score: what went with the "
                "removed units, and the most that this tolerance lets go."
                + (
                    " Uniform removes so many units; exchange is what the difference adds to or takes off "
                    "the additive loss, in % of the whole network's protection score."
                    if compared
                    else ""
                )
            ),
            titles=("layer", "removed", "most protected", "limit", "score gone", "at most")
            + (("uniform removes", "exchange") if compared else ()),
            rows=tuple(
                (
                    name,
                    f"{g['removed']:,}",
                    f"{g['overlap']:,}",
                    f"{g['overlap_bound']:,}",
                    share(g["mass"]),
                    share(g["mass_bound"]),
                    *(cells(compared[name]) if name in compared else ()),
                )
                for name, g in groups.items()
            ),
        )

    def _exchange(
        self,
        graph: Graph,
        scores: ScoreTable,
        limits: Limits,
        decision: Decision,
        protection: Mapping[str, NDArray[np.float64]],
    ) -> dict[str, JsonValue] | None:
        """Compare with `Uniform` at the same budget; without a budget, at the same MACs."""
        if not any(decision.removed.values()):
            return None
        cost = graph.cost(decision.keep)
        budget = decision.budget or Budget(macs=max(cost.macs, 1))
        other = Uniform(removal=self.removal).decide(graph, scores, budget, limits)
        other_cost = graph.cost(other.keep)
        return {
            "ratio": None if other.knob is None else float(other.knob),
            "macs": [cost.macs, other_cost.macs],
            "params": [cost.params, other_cost.params],
            **exchange(protection, decision.steps, decision.removed, other.removed),
        }


def _given_back(groups: Mapping[str, Any]) -> tuple[str, ...]:
    """A sentence about units that the tolerance would remove, but that were put back to spend the budget."""
    kept = sum(g.get("allowed", g["removed"]) - g["removed"] for g in groups.values())
    if not kept:
        return ()
    return (
        f"{kept:,} {'unit' if kept == 1 else 'units'} that this tolerance lets go stayed, to spend the "
        "budget. k counts them too: the limits are those of the tolerance, and fewer units went.",
    )


def _constant(found: Mapping[str, list[str]]) -> tuple[str, ...]:
    """A sentence about layers in which a signal gives all units the same score."""
    if not found:
        return ()
    signals = sorted({signal for flat in found.values() for signal in flat})
    return (
        f"In {joined(found)} every unit has the same score from {' and '.join(signals)}: how many units "
        "went there follows from their position, not from what they are worth.",
    )


def _warn(constant: Mapping[str, list[str]]) -> None:
    """Warn once about all groups with constant scores."""
    signals = sorted({signal for flat in constant.values() for signal in flat})
    warnings.warn(
        f"ToD: expected scores that differ within a group, got the same score for every unit from "
        f"{' and '.join(signals)} in {shorten(constant)}. How many units go there, and which if it is the "
        "removal signal, follows from their position and not from what they are worth. "
        "Use another signal, or leave these groups alone with Limits(ignore=...).",
        ConstantScoresWarning,
        stacklevel=4,  # the caller of `allocate`, which calls `certificates`
    )


def group_certificate(
    removal: NDArray[np.float64],
    protection: NDArray[np.float64],
    k: int,
    tolerance: float,
    removed: int | None = None,
) -> dict[str, JsonValue]:
    """Bounds that the tolerance gives for one group, and the actual values.

    The tolerance α allows removing the first k units: ToD(k) <= α means that at most m = floor(α·k) of them
    are among the k most protected. If units were put back to spend a budget, only the first g <= k units are
    removed. At most n = min(m, g) of these are among the k most protected. Let p_1 >= p_2 >= ... be the
    protection scores in descending order, and P their sum. Then:

    - High-protection mass: the removed units among the k most protected have at most the total score
      p_1 + ... + p_n.
    - Total mass: in the worst case the other removed units come directly after the k most protected ones. So
      all removed units have at most the total score (p_1 + ... + p_n) + (p_{k+1} + ... + p_{k+g-n}). These
      indices exist: at most N - k removed units lie outside the k most protected, so g - n <= N - k.

    The bounds assume nothing except the tolerance, and some rankings reach them. The tolerance bounds the
    share at k, so if g < k, ToD(g) can be above α.

    Args:
        removal: The lowest is removed first. [N]
        protection: The highest is most protected. [N]
        k: Number of units that the tolerance allows to remove: 0, or a k with ToD(k) <= `tolerance`.
        tolerance: α.
        removed: g, the number of units that are removed, in [0, k]. None: k.

    Returns:
        ``removed`` (g); ``allowed`` (k); ``tod`` (ToD(k)); ``overlap``, the number of removed units among the
        k most protected, and its bound ``overlap_bound``; ``high_mass``, ``high_mass_bound``, ``mass`` and
        ``mass_bound`` as shares of P. The shares are None if a score is negative or all are zero, because
        they have no meaning then.
    """
    went = k if removed is None else removed
    first = ascending(removal)[:k]
    down = ascending(protection)[::-1]
    top = np.isin(first, down[:k])
    high = first[:went][top[:went]]
    bound = min(_most(tolerance, k), went)
    found: dict[str, JsonValue] = {
        "removed": went,
        "allowed": k,
        "tod": int(top.sum()) / k if k else 0.0,
        "overlap": len(high),
        "overlap_bound": bound,
        "high_mass": None,
        "high_mass_bound": None,
        "mass": None,
        "mass_bound": None,
    }
    largest = float(protection.max())
    if protection.min() >= 0 and largest > 0:
        scaled = protection / largest  # so that no sum overflows
        # fsum rounds correctly, so rounded sums keep the order of the exact sums, and no bound fails by
        # rounding.
        total = math.fsum(scaled)
        following = down[k : k + went - bound]
        found["high_mass"] = math.fsum(scaled[high]) / total
        found["high_mass_bound"] = math.fsum(scaled[down[:bound]]) / total
        found["mass"] = math.fsum(scaled[first[:went]]) / total
        found["mass_bound"] = math.fsum(scaled[np.append(down[:bound], following)]) / total
    return found


def _most(tolerance: float, k: int) -> int:
    """The largest m with m / k <= tolerance. It compares quotients, as the comparison with ToD(k) does."""
    m = min(k, math.floor(tolerance * k) + 1)
    while m > 0 and m / k > tolerance:
        m -= 1
    return m
