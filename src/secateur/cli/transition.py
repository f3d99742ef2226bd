"""`secateur transition`: at which sparsity each rule stops being recoverable, for a user's own model."""

from __future__ import annotations

import json as json_format
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from secateur.cli.loading import Target, load_data, load_model
from secateur.cli.prune import Text
from secateur.cli.shell import Debug, Json, Seed, reported
from secateur.cli.tolerance import Place
from secateur.errors import SettingError

if TYPE_CHECKING:
    from secateur.masks.transition import Point, Transition

RULES = "uniform,erk,lamp,emp,repairability"
SPARSITIES = "0.5,0.7,0.8,0.85,0.9,0.93,0.95,0.97"


def transition(
    model: Annotated[
        str, typer.Option(help="package.module:function or file.py:function that returns the model.")
    ],
    data: Annotated[str, typer.Option(help="Labelled data: module:function, or .npz with arrays x and y.")],
    rules: Annotated[str, typer.Option(help="Rules to compare, with commas between.")] = RULES,
    sparsities: Annotated[
        str, typer.Option(help="Fractions of the weights that go, with commas.")
    ] = SPARSITIES,
    criterion: Annotated[
        str, typer.Option(help="Which weights of a layer go first: magnitude, wanda, taylor, fisher, random.")
    ] = "magnitude",
    repair: Annotated[
        str,
        typer.Option(
            help="Of every allocation alike: variance (shrunk where little signal is left), channelwise "
            "(plain), layerwise, batchnorm, reconstruct, surgeon."
        ),
    ] = "variance",
    share: Annotated[
        float, typer.Option(help="What of the dense model's accuracy counts as recovered, in (0, 1].")
    ] = 0.95,
    evaluation: Annotated[
        Text, typer.Option(help="Data to measure on, as for --data; else a held-out fifth of --data.")
    ] = None,
    plot: Annotated[Place, typer.Option(help="Draw the curves into this file: .svg, .png or .pdf.")] = None,
    batch_size: Annotated[int, typer.Option(help="For .npz files.")] = 64,
    seed: Seed = 0,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show at which sparsity of single weights each rule stops being recoverable by repair."""
    with reported(debug=debug):
        import secateur as sc
        from secateur.masks.transition import sweep
        from secateur.report.plot import check

        names, amounts = _rules(rules), _fractions(sparsities)
        _settings(criterion, repair, share)
        if plot is not None:
            check(plot)
        network, _ = load_model(Target.of("--model", model))
        calibration = sc.Calibration.of(
            load_data("--data", data, batch_size=batch_size, seed=seed), seed=seed
        )
        fit, held = calibration.split()
        if evaluation is not None:
            judged = load_data("--evaluation", evaluation, batch_size=batch_size, seed=seed)
            held = sc.Calibration.of(judged, seed=seed)
        found = sweep(
            network,
            fit,
            held,
            {name: name for name in names},
            amounts,
            criterion=criterion,
            repair=repair,
            share=share,
            seed=seed,
        )
        title = f"{type(network).__name__}, {criterion}, repaired by {repair}"
        shown = _json(title, names, found) if json else listing(title, names, found)
        if plot is not None:
            draw(names, found, plot, title)
            shown += "" if json else f"\n\nwritten to  {plot}"
    typer.echo(shown)


def listing(title: str, rules: Sequence[str], found: Transition) -> str:
    """A row for each sparsity, a column for each rule, and where each stops."""
    from secateur.report import words

    by_place = {(p.rule, p.sparsity): p for p in found.points}
    sparsities = sorted({place for _, place in by_place})
    wide = max(8, *(len(rule) for rule in rules))

    def cell(point: Point | None) -> str:
        if point is None:
            return "-"
        return f"{point.loss:.3f}" if point.accuracy is None else words.percent(point.accuracy, 1)

    def line(first: str, cells: Sequence[str]) -> str:
        return f"{first:>8}  " + "  ".join(f"{text:>{wide}}" for text in cells)

    dense = found.dense
    head = f"loss {dense.loss:.3f}" if dense.accuracy is None else f"top-1 {words.percent(dense.accuracy, 1)}"
    lines = [f"{title}; dense: {head} on {dense.samples:,} samples", "", line("sparsity", rules)]
    lines += [
        line(words.percent(s, 1), [cell(by_place.get((rule, s))) for rule in rules]) for s in sparsities
    ]
    ends = [found.last(rule) for rule in rules]
    lines += ["", line("up to", ["none" if end is None else words.percent(end, 1) for end in ends])]
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


def _rules(text: str) -> tuple[str, ...]:
    from secateur.allocate import names

    known = [name for name in names() if name != "tod"]
    found = tuple(part.strip() for part in text.split(","))
    for name in found:
        if name not in known:
            raise SettingError(f"--rules: expected names among {', '.join(known)}, got {name!r}. Name some.")
    return found


def _fractions(text: str) -> tuple[float, ...]:
    try:
        found = tuple(sorted(float(part) for part in text.split(",")))
    except ValueError:
        found = (0.0,)
    if not all(0 < value < 1 for value in found):
        raise SettingError(f"--sparsities {text}: expected fractions in (0, 1). Write 0.8,0.9, for example.")
    return found


def _settings(criterion: str, repair: str, share: float) -> None:
    from secateur.masks import CRITERIA
    from secateur.masks.transition import REPAIRS

    if criterion not in CRITERIA:
        raise SettingError(f"--criterion {criterion}: expected one of {', '.join(CRITERIA)}. Name one.")
    if repair not in REPAIRS:
        raise SettingError(f"--repair {repair}: expected one of {', '.join(REPAIRS)}. Name one.")
    if not 0 < share <= 1:
        raise SettingError(f"--share {share}: expected a number in (0, 1]. Give 0.95, for example.")
