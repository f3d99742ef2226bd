"""`secateur tolerance`: what every tolerance would leave of a model, without pruning it."""

from __future__ import annotations

import json as json_format
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from secateur.cli.loading import Target, load_data, load_model
from secateur.cli.prune import Texts
from secateur.cli.shell import Debug, Json, Seed, reported
from secateur.errors import SettingError
from secateur.report import words
from secateur.report.text import bar

if TYPE_CHECKING:
    from secateur.allocate import Curve

# Optional[...] rather than | None: typer reads it at run time, where older Pythons need it.
Place = Optional[Path]  # noqa: UP045


def tolerance(
    model: Annotated[
        str, typer.Option(help="package.module:function or file.py:function that returns the model.")
    ],
    data: Annotated[
        str, typer.Option(help="Calibration data: module:function, or .npz with arrays x and y.")
    ],
    removal: Annotated[str, typer.Option(help="Signal whose lowest scores go first.")] = "wasserstein",
    protection: Annotated[str, typer.Option(help="Signal whose highest scores are to stay.")] = "taylor",
    rows: Annotated[int, typer.Option(help="Rows of the table, about evenly spaced in MACs.")] = 20,
    plot: Annotated[Place, typer.Option(help="Draw the curve into this file: .svg, .png or .pdf.")] = None,
    round_to: Annotated[int, typer.Option(help="Keep a multiple of this many units in each layer.")] = 1,
    min_keep: Annotated[int, typer.Option(help="Keep at least this many units in each layer.")] = 1,
    ignore: Annotated[
        Texts, typer.Option(help="Leave groups of this name alone (* and ?); may be repeated.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="For .npz files.")] = 64,
    seed: Seed = 0,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what each tolerance of the rule tod would leave: MACs, parameters and units of each layer."""
    with reported(debug=debug):
        import secateur as sc
        from secateur.report.plot import check, draw

        rule = sc.ToD(removal=removal, protection=protection)
        limits = sc.Limits(round_to=round_to, min_keep=min_keep, ignore=tuple(ignore or ()))
        # Better refused now than after an hour of scoring.
        if rows < 2:
            raise SettingError(f"--rows {rows}: expected at least 2. Give 20, for example.")
        if plot is not None:
            check(plot)
        network, _ = load_model(Target.of("--model", model))
        calibration = sc.Calibration.of(
            load_data("--data", data, batch_size=batch_size, seed=seed), seed=seed
        )
        # The part that `secateur prune` scores on, so that the same tolerance means the same plan.
        fit, _ = calibration.split()
        example = calibration.first()
        graph = sc.trace(network, example.kwargs or example.args)
        curve = rule.curve(graph, sc.score(graph, fit, rule.signals, seed=seed), limits)
        title = f"{type(network).__name__}, removal {removal}, protection {protection}"
        shown = _json(title, curve) if json else listing(title, curve, rows)
        if plot is not None:
            draw(curve, plot, title)
            shown += "" if json else f"\n\nwritten to  {plot}"
    typer.echo(shown)


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
        f"{title}: {words.number(params)} parameters, {words.number(macs)} MACs for one sample",
        f"{len(curve) - 1:,} tolerances change what goes; here are {len(points)} points.",
        "",
        f"{'tolerance':>9}  {'MACs':>7}  {'':20}  {'parameters':>10}  {'least kept':>10}  {'most kept':>9}  "
        "layer that keeps least",
    ]
    for point in points:
        shares = curve.kept[point] / curve.sizes
        least = int(shares.argmin())
        lines.append(
            f"{_value(curve.knob[point]):>9}  {words.percent(curve.macs[point], macs):>7}  "
            f"{bar(int(curve.macs[point]), macs)}  {words.percent(curve.params[point], params):>10}  "
            f"{words.percent(shares[least], 1):>10}  {words.percent(shares.max(), 1):>9}  "
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
