"""`secateur tolerance`: what every tolerance would leave of a model, without pruning it."""

from __future__ import annotations

import json as json_format
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur import formatting
from secateur.cli.command import LIMITS, READING, command
from secateur.cli.inputs import Inputs, limits_of
from secateur.cli.output import file_in_place
from secateur.config.run import Run
from secateur.report.text import bar

if TYPE_CHECKING:
    from secateur.allocate import Curve


@command(
    "model",
    "data",
    "removal",
    "protection",
    "curve.rows",
    "curve.plot",
    *LIMITS,
    "allow_inexact",
    *READING,
    "seed",
    needs=("model", "data"),
)
def tolerance(run: Run, json: bool) -> str:
    """Show what each tolerance of the rule tod would leave: MACs, parameters and units of each layer."""
    import secateur as sc
    from secateur.report.plot import check, draw

    rule = sc.ToD(removal=run.removal or "wasserstein", protection=run.protection or "taylor")
    plot = None if run.curve.plot is None else Path(run.curve.plot)
    if plot is not None:
        check(plot)  # better refused now than after an hour of scoring
    inputs = Inputs(run)
    # The part that `secateur prune` scores on, so that the same tolerance means the same plan.
    fit, _ = inputs.data.split()
    graph = sc.trace(inputs.model, inputs.example, allow_inexact=run.allow_inexact)
    curve = rule.curve(graph, sc.score(graph, fit, rule.signals, seed=run.seed), limits_of(run))
    title = f"{type(inputs.model).__name__}, removal {rule.removal}, protection {rule.protection}"
    shown = _json(title, curve) if json else listing(title, curve, run.curve.rows)
    if plot is not None:
        with file_in_place(plot) as partial:
            draw(curve, partial, title)
        shown += "" if json else f"\n\nwritten to  {plot}"
    return shown


def _json(title: str, curve: Curve) -> str:
    """One line for each entry, and one for each point of what is kept: long, but to be read."""
    found: dict[str, Any] = {"title": title, **curve.to_dict()}
    return (
        "{\n "
        + ",\n ".join(f"{json_format.dumps(k)}: {json_format.dumps(v)}" for k, v in found.items())
        + "\n}"
    )


def listing(title: str, curve: Curve, rows: int) -> str:
    """A table of at most `rows` points, for a terminal."""
    points = curve.spread(rows)
    macs, params = int(curve.macs[0]), int(curve.params[0])
    lines = [
        f"{title}: {formatting.number(params)} parameters, {formatting.number(macs)} MACs for one sample",
        f"{len(curve) - 1:,} tolerances change what goes; here are {len(points)} points.",
        "",
        f"{'tolerance':>9}  {'MACs':>7}  {'':20}  {'parameters':>10}  {'least kept':>10}  {'most kept':>9}  "
        "layer that keeps least",
    ]
    for point in points:
        shares = curve.kept[point] / curve.sizes
        least = int(shares.argmin())
        lines.append(
            f"{_value(curve.knob[point]):>9}  {formatting.percent(curve.macs[point], macs):>7}  "
            f"{bar(int(curve.macs[point]), macs)}  {formatting.percent(curve.params[point], params):>10}  "
            f"{formatting.percent(shares[least], 1):>10}  {formatting.percent(shares.max(), 1):>9}  "
            + (curve.groups[least] if shares[least] < 1 else "")
        )
    return "\n".join(line.rstrip() for line in [*lines, "", *_notes()])


def _notes() -> tuple[str, ...]:
    return (
        "A row holds from its tolerance on, which is rounded up to four digits; none: below the first.",
        "Prune with one: secateur prune --tolerance ... with the same model, data and seed.",
    )


def _value(knob: float) -> str:
    """Rounded up, so that what is shown reaches the point."""
    return "none" if math.isinf(knob) else f"{math.ceil(knob * 1e4) / 1e4:.4f}"
