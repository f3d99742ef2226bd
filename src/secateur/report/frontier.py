"""Show cost against quality: the models that were measured on held-out data, as a table and in sentences."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from secateur.common.formatting import MINUS, share
from secateur.report.shapes import Tick, round_numbers

if TYPE_CHECKING:
    from secateur.pipeline.bounds.frontier import Frontier, Point

AGREEMENT = "agreement with the dense model"
NAMES = {"macs": "MACs", "params": "parameters", "experts": "experts", "sparsity": "weights"}
"""What plans keep a share of, by the field of the budget."""


def damage(found: Frontier, value: float | str) -> str:
    """A drop in points, or a rise in percent. It may be text in a report that was read from JSON.

    Example:
        >>> from secateur.pipeline.bounds.frontier import Frontier
        >>> asked = {"cost": "macs", "measure": "accuracy", "dense": 0.9, "samples": 500, "confidence": 0.95}
        >>> damage(Frontier(bound="accuracy_drop", **asked), 0.004)
        '0.40'
        >>> damage(Frontier(bound="perplexity_rise", **asked), -0.05)
        '−5.0 %'
    """
    if not isinstance(value, int | float) or not math.isfinite(value):
        return "not finite"
    sign = MINUS if round(value, 6) < 0 else ""
    size = abs(100 * value)
    return f"{sign}{size:.2f}" if found.bound == "accuracy_drop" else f"{sign}{size:.1f} %"


def unit(found: Frontier) -> str:
    """What the numbers of `damage` are, to go behind one of them."""
    return " points" if found.bound == "accuracy_drop" else ""


def reached(found: Frontier, value: float) -> str:
    """An accuracy in percent, or a loss."""
    return f"{100 * value:.2f} %" if found.measure in ("accuracy", AGREEMENT) else f"{value:.4g}"


def title(found: Frontier) -> str:
    """The section's title."""
    return f"Cost against {found.measure}"


def sentences(found: Frontier) -> tuple[str, ...]:
    """Explain the table of points."""
    sure, samples = f"{100 * found.confidence:g} %", f"{found.samples:,} held-out samples"
    names = {"accuracy_drop": "drop", "loss_rise": "rise of the loss"}
    name = names.get(found.bound, "rise of the perplexity")
    lines = []
    chosen = next((point for point in found.points if point.verdict == "chosen"), None)
    if chosen is not None and found.limit is not None:
        looked = sum(bool(point.verdict) for point in found.points)
        behind = unit(found)
        lines.append(
            f"The {name} is at most {damage(found, found.limit)}{behind} ({sure}): measured "
            f"{damage(found, chosen.damage)}, at most {damage(found, chosen.most)}{behind}, on {samples}. "
            f"{looked} {'plan was' if looked == 1 else 'plans were'} looked at, from the largest to the "
            "smallest, until one was not confirmed to be within. Their order was fixed before these samples "
            "were read."
        )
    lines.append(
        f"All from one scoring, repaired and measured on {samples} that nothing else read: {found.measure}, "
        f"dense {reached(found, found.dense)}. Intervals are of {sure}, each by itself."
    )
    return tuple(lines)


def titles(found: Frontier) -> tuple[str, ...]:
    """Return the column titles."""
    change = "drop, points" if found.bound == "accuracy_drop" else "rise"
    asked = f"{NAMES.get(found.cost, found.cost)} asked"
    return (asked, "MACs", "parameters", found.measure, change, "interval", "outcome")


def rows(found: Frontier) -> tuple[tuple[str, ...], ...]:
    """Return one row of cells for each point."""
    return tuple(_cells(found, point) for point in found.points)


def _cells(found: Frontier, point: Point) -> tuple[str, ...]:
    return (
        share(point.share),
        share(point.macs),
        share(point.params),
        reached(found, point.value),
        damage(found, point.damage),
        f"{damage(found, point.low)} to {damage(found, point.high)}",
        point.verdict,
    )


def lines(found: Frontier) -> tuple[str, ...]:
    """Return the explanation, and then one line for each point."""
    return (*sentences(found), *(_line(found, cells) for cells in rows(found)))


def _line(found: Frontier, cells: tuple[str, ...]) -> str:
    _, macs, params, value, change, between, verdict = cells
    cost = f"{params} of the parameters" if macs == share(None) else f"{macs} of the MACs"
    behind = unit(found)
    return f"{cost}: {found.measure} {value}, {change}{behind} ({between})" + (
        f"; {verdict}" if verdict else ""
    )


@dataclass(frozen=True)
class Mark:
    """One point of the plot, in percent of its width and height; (0, 0) is the top left corner.

    Attributes:
        x: From the left.
        y: From the top.
        top: Where its interval begins.
        bottom: Where it ends.
        chosen: Whether it is the result.
        text: The point in words.
    """

    x: float
    y: float
    top: float
    bottom: float
    chosen: bool
    text: str


@dataclass(frozen=True)
class FrontierPlot:
    """Damage against cost. The dense model is at the right edge.

    Attributes:
        marks: The points.
        limit: The height of the largest damage that was asked for; None if none was.
        across: Ticks of the cost.
        up: Ticks of the damage.
        cost: What the cost is.
        change: What the damage is.
    """

    marks: tuple[Mark, ...]
    limit: float | None
    across: tuple[Tick, ...]
    up: tuple[Tick, ...]
    cost: str
    change: str


def plot(found: Frontier | None) -> FrontierPlot | None:
    """Return the plot; None where there are no two points to draw."""
    points = [] if found is None else [p for p in found.points if _finite(p)]
    if found is None or len(points) < 2:
        return None
    by_macs = all(point.macs is not None for point in points) and found.cost != "params"
    costs = [100 * (point.macs if by_macs and point.macs is not None else point.params) for point in points]
    left = max(0.0, min(costs) - 0.1 * (100 - min(costs)))
    values = [100 * each for p in points for each in (p.low, p.high)] + [0.0]
    values += [] if found.limit is None else [100 * found.limit]
    low, high = min(values), max(values)
    margin = 0.06 * ((high - low) or 1.0)
    low, high = low - margin, high + margin

    def x(value: float) -> float:
        return 100 * (value - left) / max(100 - left, 1e-9)

    def y(value: float) -> float:
        return 100 * (high - value) / (high - low)

    return FrontierPlot(
        marks=tuple(
            Mark(
                x(cost), y(100 * p.damage), y(100 * p.high), y(100 * p.low), p.verdict == "chosen",
                _line(found, cells),
            )
            for cost, p, cells in zip(costs, points, [_cells(found, p) for p in points], strict=True)
        ),
        limit=None if found.limit is None else y(100 * found.limit),
        across=tuple(Tick(x(at), f"{at:.3g} %") for at in round_numbers(left, 100.0)),
        up=tuple(Tick(y(at), f"{at:.3g}".replace("-", MINUS)) for at in round_numbers(low, high)),
        cost="MACs" if by_macs else "parameters",
        change=titles(found)[4] if found.bound == "accuracy_drop" else "rise, %",
    )  # fmt: skip


def _finite(point: Point) -> bool:
    return all(
        isinstance(each, int | float) and math.isfinite(each)
        for each in (point.damage, point.low, point.high)
    )
