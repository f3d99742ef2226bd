"""Collect the report's data on layers from scores and plan: histograms and the curve of the knob."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from secateur.allocators import Curve
from secateur.errors import PlanError
from secateur.plan import Plan
from secateur.report.data import Histogram, Knob, Layer
from secateur.signals.scores import Scores

BINS = 24
POINTS = 200
"""Most points of the curve that the report keeps. A screen shows fewer."""

SKEWED = 0.1
"""Bins are logarithmic if the median lies below this share of the range from lowest to highest score."""


def layers_of(plan: Plan, scores: Scores | None = None) -> tuple[Layer, ...]:
    """Return the kept and total units of each group of a plan, with histograms of the scores.

    Args:
        plan: The plan.
        scores: The scores that the plan was made from. If None, there are no histograms.
    """
    return tuple(
        Layer(
            group=g.name,
            kept=g.kept,
            total=g.size,
            producers=tuple(dict.fromkeys(s.tensor for s in g.slices if s.role == "produce")),
            scores=histograms(scores, g.name, g.keep),
        )
        for g in plan.groups
    )


def histograms(scores: Scores | None, group: str, keep: NDArray[np.bool_]) -> tuple[Histogram, ...]:
    """Return one histogram for each signal that scored the group.

    Args:
        scores: The scores; None gives no histogram.
        group: The group's name.
        keep: True for each unit that is kept. [any shape of group.size entries]
    """
    by_signal: Mapping[str, Mapping[str, NDArray[np.float64]]] = {} if scores is None else scores.values
    return tuple(
        histogram(signal, by_group[group], keep.ravel())
        for signal, by_group in by_signal.items()
        if group in by_group
    )


def histogram(signal: str, scores: NDArray[np.float64], keep: NDArray[np.bool_]) -> Histogram:
    """Count kept and removed units by their score.

    Args:
        signal: The signal's name.
        scores: Finite scores; higher is worth more. [units]
        keep: True for each unit that is kept. [units]

    Example:
        >>> found = histogram("magnitude", np.array([1.0, 2.0, 3.0]), np.array([False, True, True]))
        >>> found.cut, sum(found.kept), sum(found.removed)
        (2.0, 2, 1)
    """
    low, high = float(scores.min()), float(scores.max())
    scale: Literal["linear", "log"] = "log" if _skewed(scores, low, high) else "linear"
    if low == high:
        edges = np.array([low, high])
    else:
        edges = np.geomspace(low, high, BINS + 1) if scale == "log" else _spaced(low, high)
        edges[0], edges[-1] = low, high  # undo rounding, so that no score falls outside
    lowest = float(scores[keep].min()) if keep.any() else high
    parted = bool((~keep).any()) and float(scores[~keep].max()) <= lowest
    return Histogram(
        signal=signal,
        edges=tuple(edges.tolist()),
        kept=tuple(np.histogram(scores[keep], edges)[0].tolist()),
        removed=tuple(np.histogram(scores[~keep], edges)[0].tolist()),
        cut=lowest if parted else None,
        scale=scale,
    )


def _skewed(scores: NDArray[np.float64], low: float, high: float) -> bool:
    """Whether equally wide bins would put most units of positive scores into the first few."""
    if low <= 0:
        return False
    return float(np.median(scores / high)) - low / high < SKEWED * (1 - low / high)


def _spaced(low: float, high: float) -> NDArray[np.float64]:
    """Return equally spaced edges. Halved first, because ``high - low`` can overflow for huge scores."""
    edges: NDArray[np.float64] = 2 * np.linspace(low / 2, high / 2, BINS + 1)
    return edges


def knob_of(plan: Plan) -> Knob | None:
    """Return the cost curve of the rule's knob, with at most about `POINTS` points; None if there is none.

    The plan's point on the curve is the first point at which no group keeps more than the plan does. If
    units were added back to use up a budget, this is the point before they were added.
    """
    try:
        curve = plan.curve
    except PlanError:
        return None
    if len(curve) < 2:
        return None
    at = _point(curve, plan)
    shown = curve.spread(POINTS)
    shown = np.unique(np.append(shown, [0] if at is None else [0, at]))
    return Knob(
        values=tuple(curve.knob[shown[1:]].tolist()),
        macs=tuple(curve.macs[shown].tolist()),
        params=tuple(curve.params[shown].tolist()),
        at=None if not at else int(np.searchsorted(shown, at)) - 1,
    )


def _point(curve: Curve, plan: Plan) -> int | None:
    """Return the index of the plan's point on the curve; see `knob_of`."""
    kept = {group.name: group.kept for group in plan.groups}
    enough = (curve.kept <= [kept[name] for name in curve.groups]).all(axis=1)
    return int(enough.argmax()) if enough.any() else None
