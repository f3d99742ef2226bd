"""`secateur transition`: at which sparsity each rule stops being recoverable, for a user's own model."""

from __future__ import annotations

import json as json_format
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.cli.command import READING, command
from secateur.cli.inputs import Inputs
from secateur.cli.output import file_in_place
from secateur.config.run import Run

if TYPE_CHECKING:
    from secateur.masks.transition import Point, Transition


@command(
    "model",
    "data",
    "transition.rules",
    "transition.sparsities",
    "transition.criterion",
    "transition.repair",
    "transition.share",
    "evaluation",
    "transition.plot",
    *READING,
    "seed",
    needs=("model", "data"),
)
def transition(run: Run, json: bool) -> str:
    """Show at which sparsity of single weights each rule stops being recoverable by repair."""
    from secateur.masks.transition import sweep
    from secateur.report.plot import check

    asked = run.transition
    plot = None if asked.plot is None else Path(asked.plot)
    if plot is not None:
        check(plot)
    inputs = Inputs(run)
    fit, held = inputs.data.split()
    found = sweep(
        inputs.model,
        fit,
        inputs.evaluation or held,
        {name: name for name in asked.rules},
        sorted(asked.sparsities),
        criterion=asked.criterion,
        repair=asked.repair,
        share=asked.share,
        seed=run.seed,
    )
    title = f"{type(inputs.model).__name__}, {asked.criterion}, repaired by {asked.repair}"
    shown = _json(title, asked.rules, found) if json else listing(title, asked.rules, found)
    if plot is not None:
        with file_in_place(plot) as partial:
            draw(asked.rules, found, partial, title)
        shown += "" if json else f"\n\nwritten to  {plot}"
    return shown


def listing(title: str, rules: Sequence[str], found: Transition) -> str:
    """A row for each sparsity, a column for each rule, and where each stops."""
    from secateur import formatting

    by_place = {(p.rule, p.sparsity): p for p in found.points}
    sparsities = sorted({place for _, place in by_place})
    wide = max(8, *(len(rule) for rule in rules))

    def cell(point: Point | None) -> str:
        if point is None:
            return "-"
        return f"{point.loss:.3f}" if point.accuracy is None else formatting.percent(point.accuracy, 1)

    def line(first: str, cells: Sequence[str]) -> str:
        return f"{first:>8}  " + "  ".join(f"{text:>{wide}}" for text in cells)

    dense = found.dense
    head = (
        f"loss {dense.loss:.3f}"
        if dense.accuracy is None
        else f"top-1 {formatting.percent(dense.accuracy, 1)}"
    )
    lines = [f"{title}; dense: {head} on {dense.samples:,} samples", "", line("sparsity", rules)]
    lines += [
        line(formatting.percent(s, 1), [cell(by_place.get((rule, s))) for rule in rules]) for s in sparsities
    ]
    ends = [found.last(rule) for rule in rules]
    lines += ["", line("up to", ["none" if end is None else formatting.percent(end, 1) for end in ends])]
    lines.append(
        f"up to: the last sparsity, from the lowest on, at which {found.share:.0%} of the dense is kept."
    )
    return "\n".join(text.rstrip() for text in lines)


def draw(rules: Sequence[str], found: Transition, path: Path, title: str) -> None:
    """Draws accuracy, or loss, against sparsity, a curve for each rule."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from secateur.report.plot import METADATA

    by_accuracy = found.dense.accuracy is not None
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for rule in rules:
        points = sorted((p for p in found.points if p.rule == rule), key=lambda p: p.sparsity)
        heights = [100 * (p.accuracy or 0.0) if by_accuracy else p.loss for p in points]
        axes.plot([100 * p.sparsity for p in points], heights, marker="o", markersize=3, label=rule)
    dense = 100 * (found.dense.accuracy or 0.0) if by_accuracy else found.dense.loss
    axes.axhline(dense, color="black", linewidth=0.8, label="dense")
    border = dense * found.share if by_accuracy else dense / found.share
    axes.axhline(border, color="black", linewidth=0.8, linestyle=":", label="recovered")
    axes.set(xlabel="% of weights removed", ylabel="top-1 %" if by_accuracy else "loss", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    with mpl.rc_context({"svg.hashsalt": "secateur"}):
        figure.savefig(path, dpi=150, metadata=METADATA[path.suffix.lower()])


def _json(title: str, rules: Sequence[str], found: Transition) -> str:
    content: Mapping[str, Any] = {
        "title": title,
        "dense": asdict(found.dense),
        "share": found.share,
        "last": {rule: found.last(rule) for rule in rules},
        "points": [asdict(point) for point in found.points],
    }
    return json_format.dumps(content, indent=1)
