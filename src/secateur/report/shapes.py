"""Compute the shapes of the HTML page's plots.

Positions are in percent of a plot's width and height; (0, 0) is the top left corner. The page's template
turns them into SVG. Plots stretch with the page, labels do not, so they stay readable on small screens.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from secateur.common.formatting import milliseconds
from secateur.report import sentences

if TYPE_CHECKING:
    from secateur.report.data import Facts, Histogram

MOST_RUNS_BEYOND = 2.0
"""The plot of passes ends at this many times the slower model's third quartile. Slower passes are counted
but not drawn."""


@dataclass(frozen=True)
class Tick:
    """A labelled position on an axis, in percent."""

    at: float
    label: str


@dataclass(frozen=True)
class Bars:
    """The shape of a histogram. The bars of kept units stand on top of the bars of removed units.

    Attributes:
        kept: SVG path of the bars of kept units.
        removed: SVG path of the bars of removed units.
        cut: Position of the cut, from the left; None if there is none.
        low: Label of the left edge.
        high: Label of the right edge.
        cut_label: Label of the cut.
        most: Units in the highest bin.
        text: The histogram in words, for screen readers.
    """

    kept: str
    removed: str
    cut: float | None
    low: str
    high: str
    cut_label: str
    most: int
    text: str


def bars(histogram: Histogram) -> Bars:
    """Return the shape of a histogram. All bins are drawn with equal width."""
    bins = len(histogram.kept)
    totals = [k + r for k, r in zip(histogram.kept, histogram.removed, strict=True)]
    most = max(totals)
    low, high = (f"{edge:.3g}" for edge in (histogram.edges[0], histogram.edges[-1]))
    label = "" if histogram.cut is None else f"{histogram.cut:.3g}"
    kept, removed = sum(histogram.kept), sum(histogram.removed)
    return Bars(
        kept=_columns(histogram.removed, totals, most),
        removed=_columns([0] * bins, histogram.removed, most),
        cut=None if histogram.cut is None else 100 * _position_in_bins(histogram, histogram.cut) / bins,
        low=low,
        high=high,
        cut_label=label,
        most=most,
        text=f"{histogram.signal}: {kept} units stay and {removed} go, scores from {low} to {high}"
        + (f", cut at {label}" if label else "")
        + (", bins are equal factors" if histogram.scale == "log" else ""),
    )


def _columns(bottom: Sequence[int], top: Sequence[int], most: int) -> str:
    width = 100 / len(top)
    return "".join(
        f"M{i * width:.4g} {100 - 100 * b / most:.4g}H{(i + 1) * width:.4g}V{100 - 100 * t / most:.4g}"
        f"H{i * width:.4g}Z"
        for i, (b, t) in enumerate(zip(bottom, top, strict=True))
        if t > b
    )


def _position_in_bins(histogram: Histogram, score: float) -> float:
    """Return the position of a score, in bins from the left."""
    edges = histogram.edges
    i = min(max(bisect.bisect_right(edges, score) - 1, 0), len(edges) - 2)
    below, above = edges[i], edges[i + 1]
    if above <= below:
        return float(i)
    if histogram.scale == "log":
        return i + math.log(score / below) / math.log(above / below)
    return i + (score / 2 - below / 2) / (above / 2 - below / 2)


@dataclass(frozen=True)
class KnobPlot:
    """The shape of the cost curve of the rule's knob.

    Attributes:
        macs: SVG path of the MACs.
        params: SVG path of the parameters.
        ticks: Ticks on the knob's axis.
        plan: Position of the plan, (from the left, from the top); None if nothing was removed.
        name: Name of the knob.
        text: The curve in sentences.
    """

    macs: str
    params: str
    ticks: tuple[Tick, ...]
    plan: tuple[float, float] | None
    name: str
    text: str


def knob_plot(report: Facts) -> KnobPlot | None:
    """Return the shape of the knob's cost curve; None if there is no curve."""
    curve = report.knob
    if curve is None:
        return None
    values = curve.values
    # Values that span orders of magnitude, such as prices, get a logarithmic axis.
    wide = values[0] > 0 and values[len(values) // 2] < 0.1 * values[-1]
    scaled = [math.log10(value) for value in values] if wide else list(values)
    right = scaled[-1]
    margin = 0.03 * ((right - scaled[0]) or abs(right) or 1.0)
    left = 0.0 if not wide and 0 <= scaled[0] and right > 0 else scaled[0] - margin
    right += margin

    def across(value: float) -> float:
        return 100 * (value - left) / (right - left)

    places = [0.0, *map(across, scaled), 100.0]
    found = None
    if curve.at is not None:
        found = (places[curve.at + 1], 100 * (1 - report.figures[-1].macs / max(curve.macs[0], 1)))
    return KnobPlot(
        macs=_steps(places, curve.macs),
        params=_steps(places, curve.params),
        ticks=tuple(
            Tick(across(at), f"{10**at:.3g}" if wide else f"{at:.3g}") for at in round_numbers(left, right)
        ),
        plan=found,
        name=sentences.rule(report).knob,
        text=sentences.knob(report),
    )


def _steps(places: Sequence[float], values: Sequence[int]) -> str:
    top = max(values[0], 1)
    path = "".join(
        f"V{100 - 100 * value / top:.5g}H{place:.5g}" for value, place in zip(values, places[1:], strict=True)
    )
    return f"M0 0{path}"


def round_numbers(low: float, high: float, about: int = 5) -> Iterable[float]:
    """Return about `about` round numbers between two, for the ticks of an axis."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= 0.8 * raw)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


@dataclass(frozen=True)
class Strip:
    """The timed passes of one model. All models share one time axis that starts at 0.

    Attributes:
        stage: The model: ``dense`` or ``pruned``.
        runs: Position of each pass.
        box: Positions of first quartile, third quartile and median.
        beyond: Number of passes beyond the right edge.
        figure: The median as text.
    """

    stage: str
    runs: tuple[float, ...]
    box: tuple[float, float, float]
    beyond: int
    figure: str


def strips(report: Facts) -> tuple[tuple[Strip, ...], tuple[Tick, ...]]:
    """Return the timed passes of each model, and the ticks of their common axis in milliseconds."""
    # A repaired model was not timed again: it has the pruned one's passes.
    timed = [f for f in report.figures[:2] if f.latency_runs and f.latency and f.latency_quartiles]
    if not timed:
        return (), ()
    quartiles = [f.latency_quartiles or (0.0, 0.0) for f in timed]
    limit = MOST_RUNS_BEYOND * max(high for _, high in quartiles)
    width = 1.05 * min(max(max(f.latency_runs) for f in timed), limit) or 1.0
    made = tuple(
        Strip(
            stage=f.stage,
            runs=tuple(100 * run / width for run in f.latency_runs if run <= width),
            box=(100 * low / width, 100 * high / width, 100 * (f.latency or 0) / width),
            beyond=sum(run > width for run in f.latency_runs),
            figure=milliseconds(f.latency or 0),
        )
        for f, (low, high) in zip(timed, quartiles, strict=True)
    )
    ticks = tuple(Tick(100 * at / (1e3 * width), f"{at:.3g}") for at in round_numbers(0, 1e3 * width))
    return made, ticks
