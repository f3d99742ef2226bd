"""Tolerance of Difference: each group loses as much as two signals agree on.

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

from secateur.allocate.base import Allocator
from secateur.allocate.budget import Budget
from secateur.allocate.checks import fraction
from secateur.allocate.decision import Decision
from secateur.allocate.description import Certificate
from secateur.allocate.exchange import cells, exchange, sentences
from secateur.allocate.limits import Limits
from secateur.allocate.naming import shorten
from secateur.allocate.ranking import ascending, ranks
from secateur.allocate.signals import ScoreTable, vector
from secateur.allocate.step_function import StepFunction
from secateur.allocate.uniform import Uniform
from secateur.errors import ConstantScoresWarning, ScoreError
from secateur.formatting import share
from secateur.formatting import shorten as joined
from secateur.score.combination import Asked, name_of

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
    of half of it, and it loses ``floor(N / (2 - tolerance))`` units. Scores that are constant in a group
    that loses units are a `ConstantScoresWarning`.

    Source: Lin et al. 2025, FAIR-Pruner, arXiv 2508.02291. Departure: the paper fixes a bound of
    0.99·N on k; here it is ``Limits.max_ratio``, with that default.

    Attributes:
        tolerance: α, in [0, 1].
        removal: Signal whose lowest scores go first: a name (``"l1*wasserstein"`` too) or an instance.
        protection: Signal whose highest scores are to stay.

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
    removal: Asked = "wasserstein"
    protection: Asked = "taylor"
    name: ClassVar[str] = "tod"
    solved: ClassVar[str] = "tolerance"
    on_weights: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Checks the values."""
        object.__setattr__(self, "tolerance", fraction("ToD", "tolerance", self.tolerance, one=True))

    @property
    def signals(self) -> tuple[Asked, ...]:
        """The removal and the protection signal."""
        same = name_of(self.removal) == name_of(self.protection)
        return (self.removal,) if same else (self.removal, self.protection)

    def knob(self, budget: Budget | None) -> float | None:
        """The tolerance."""
        return self.tolerance

    def settings(self, knob: float | None) -> dict[str, JsonValue]:
        """The tolerance that decided, and the two signals."""
        tolerance = None if knob is None else float(knob)
        return {
            "tolerance": tolerance,
            "removal": name_of(self.removal),
            "protection": name_of(self.protection),
        }

    def steps(self, graph: Graph, scores: ScoreTable, limits: Limits) -> Mapping[str, StepFunction]:
        """k(α), the largest allowed k with ToD(k) <= α: never falling in α, though ToD(k) is not in k."""
        found: dict[str, StepFunction] = {}
        for group in limits.considered(graph.groups):
            removal = vector(scores, self.removal, group)
            allowed = limits.feasible(group.size)
            values = tolerance_curve(removal, vector(scores, self.protection, group))[allowed - 1]
            # A k is the largest for some α if and only if its ToD is below that of every larger k.
            later = np.minimum.accumulate(np.append(values, np.inf)[::-1])[::-1][1:]
            changes = values < later
            found[group.name] = StepFunction(ascending(removal), knob=values[changes], count=allowed[changes])
        return found

    def certificates(
        self, graph: Graph, scores: ScoreTable, limits: Limits, decision: Decision
    ) -> dict[str, JsonValue]:
        """What the tolerance bounds, what happened, and the exchange with `Uniform` at the same budget.

        Returns:
            ``tolerance``; ``groups``, by `group_certificate`; ``exchange``, by `exchange`, with
            ``macs`` and ``params`` of both (None where nothing goes); ``constant``, the signals
            that are constant in a group that loses units, by group.
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
        """How much of what the protection signal values went, and how that compares with `Uniform`."""
        if not {"tolerance", "groups"} <= found.keys():
            return super().certificate(found)
        if found["tolerance"] is None:
            return Certificate(sentences=("Nothing had to go, so nothing is guaranteed.",))
        groups, tolerance = found["groups"], float(found["tolerance"])
        removed, overlap, bound = (
            sum(g[name] for g in groups.values()) for name in ("removed", "overlap", "overlap_bound")
        )
        said = (
            f"Tolerance of Difference {tolerance:.4g}: of the k units that a layer lost, at most "
            f"{100 * tolerance:.3g} % are among the k of that layer that the protection signal values most.",
            f"Over all layers {removed:,} units went; {overlap:,} of them were among those, and "
            f"{bound:,} was the limit.",
        )
        exchanged = found.get("exchange") or {}
        compared = exchanged.get("groups", {})
        return Certificate(
            sentences=(
                *said,
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
        """The exchange with `Uniform` under the same budget; if there was none, with the same MACs."""
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
    """Says how many units stay although the tolerance lets them go."""
    kept = sum(g.get("allowed", g["removed"]) - g["removed"] for g in groups.values())
    if not kept:
        return ()
    return (
        f"{kept:,} {'unit' if kept == 1 else 'units'} that this tolerance lets go stayed, to spend the "
        "budget. k counts them too: the limits are those of the tolerance, and fewer units went.",
    )


def _constant(found: Mapping[str, list[str]]) -> tuple[str, ...]:
    """Names the layers whose units a signal cannot tell apart."""
    if not found:
        return ()
    signals = sorted({signal for flat in found.values() for signal in flat})
    return (
        f"In {joined(found)} every unit has the same score from {' and '.join(signals)}: how many units "
        "went there follows from their position, not from what they are worth.",
    )


def _warn(constant: Mapping[str, list[str]]) -> None:
    """One warning for all groups."""
    signals = sorted({signal for flat in constant.values() for signal in flat})
    warnings.warn(
        f"ToD: expected scores that differ within a group, got the same score for every unit from "
        f"{' and '.join(signals)} in {shorten(constant)}. How many units go there, and which if it is the "
        "removal signal, follows from their position and not from what they are worth. "
        "Use another signal, or leave these groups alone with Limits(ignore=...).",
        ConstantScoresWarning,
        stacklevel=4,  # behind certificates and allocate
    )


def group_certificate(
    removal: NDArray[np.float64],
    protection: NDArray[np.float64],
    k: int,
    tolerance: float,
    removed: int | None = None,
) -> dict[str, JsonValue]:
    """What the tolerance guarantees about one group that loses its first units, and what happened.

    The tolerance α lets the first k units go: ToD(k) <= α says that at most m = floor(α·k) of them are
    among the k most protected. All of them go, or only the first g, where a budget is spent to the last
    unit; then no more than n = min(m, g) of those are among the k most protected. With the protection
    scores in descending order p_1 >= p_2 >= ... and P their sum:

    - high-protection mass: the removed units among the k most protected carry at most p_1 + ... + p_n;
    - all mass: the other removed units are at best those that follow the k most protected, so the
      removed units carry at most (p_1 + ... + p_n) + (p_{k+1} + ... + p_{k+g-n}). There are that many: no
      more than N - k of the removed units are outside the k most protected, hence g - n <= N - k.

    The bounds hold with equality for some rankings and assume nothing but the tolerance. That of k is
    the tolerance's, so with g < k it is the share at k that is bounded: ToD(g) may be above α.

    Args:
        removal: Lowest goes first. [N]
        protection: Highest is most protected. [N]
        k: Number of units that the tolerance lets go, 0 or one with ToD(k) <= `tolerance`.
        tolerance: α.
        removed: g, in [0, k]; k if not given.

    Returns:
        ``removed`` (g), ``allowed`` (k), ``tod`` (ToD(k)); ``overlap`` (removed units among the k most
        protected) and ``overlap_bound`` in units; ``high_mass``, ``high_mass_bound``, ``mass`` and
        ``mass_bound`` as shares of P, which are None where shares have no meaning: a score is negative,
        or all are zero.
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
        # Correctly rounded sums keep the order of the exact ones: no bound fails by rounding alone.
        total = math.fsum(scaled)
        following = down[k : k + went - bound]
        found["high_mass"] = math.fsum(scaled[high]) / total
        found["high_mass_bound"] = math.fsum(scaled[down[:bound]]) / total
        found["mass"] = math.fsum(scaled[first[:went]]) / total
        found["mass_bound"] = math.fsum(scaled[np.append(down[:bound], following)]) / total
    return found


def _most(tolerance: float, k: int) -> int:
    """The largest m with m / k <= tolerance: the floor of tolerance·k, compared as ToD is."""
    m = min(k, math.floor(tolerance * k) + 1)
    while m > 0 and m / k > tolerance:
        m -= 1
    return m
