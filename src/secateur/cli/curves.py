"""`secateur compare`, `tolerance` and `transition`: compare rules, and show curves over a rule's knob."""

from __future__ import annotations

import json as json_format
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.cli.command import LIMITS, READING, command
from secateur.cli.inputs import Inputs, limits_of, repairs_of, rule_or_chooser
from secateur.common.formatting import number, percent
from secateur.config.run import Run
from secateur.report.text import bar

if TYPE_CHECKING:
    from secateur.allocators import Curve
    from secateur.targets.weights.transition import Point, Transition

TOLERANCE_NOTES = (
    "A row holds from its tolerance on, which is rounded up to four digits; none: below the first.",
    "Prune with one: secateur prune --tolerance ... with the same model, data and seed.",
)


@command(
    "model",
    "data",
    "granularity",
    "compare.rules",
    "compare.macs",
    "compare.sparsities",
    "compare.experts",
    "removal",
    "repair",
    "polish_passes",
    *LIMITS,
    "allow_inexact",
    "form",
    "evaluation",
    "compare.plot",
    *READING,
    "seed",
    needs=("model", "data"),
)
def compare(run: Run, json: bool) -> str:
    """Compare rules at equal budgets."""
    import secateur as sc
    from secateur.pipeline.compare import compare as compare_rules
    from secateur.pipeline.compare import draw
    from secateur.pipeline.options import TARGETS

    settings = run.compare
    plot = _plot(settings.plot)
    inputs, kind, given = Inputs(run), TARGETS[run.granularity], settings.model_fields_set
    budgets = [
        *(sc.Budget(macs=share) for share in sorted(settings.macs, reverse=True) if "macs" in given),
        *(sc.Budget(sparsity=share) for share in sorted(settings.sparsities)),
        *(sc.Budget(experts=share) for share in sorted(settings.experts, reverse=True)),
    ]
    found = compare_rules(
        inputs.model,
        inputs.data,
        {
            name: rule_or_chooser(run, name)
            for name in (settings.rules if "rules" in given else kind.compared)
        },
        budgets or kind.budgets,
        repairs_of(run),
        granularity=run.granularity,
        limits=limits_of(run),
        form=run.form,
        evaluation=inputs.evaluation,
        allow_inexact=run.allow_inexact,
        seed=run.seed,
    )
    drawn = _drawn(plot, partial(draw, found))
    return json_format.dumps(found.to_dict(), indent=1) if json else str(found) + drawn


def _plot(text: str | None) -> Path | None:
    """The file of a plot. It is checked now, not after an hour of scoring."""
    from secateur.report.plot import check

    if text is None:
        return None
    check(Path(text))
    return Path(text)


def _drawn(plot: Path | None, draw: Callable[[Path], None]) -> str:
    """Draw into the file, whole or not at all. Returns what the command says of it."""
    if plot is None:
        return ""
    draw(plot)
    return f"\n\nwritten to  {plot}"


@command(
    "model",
    "data",
    "granularity",
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
    """Show what each tolerance of the rule tod would leave."""
    import secateur as sc
    from secateur.pipeline.options import TARGETS
    from secateur.report.plot import draw

    signals = {"removal": run.removal, "protection": run.protection}
    rule = TARGETS[run.granularity].rule("tod")
    rule = replace(rule, **{name: signal for name, signal in signals.items() if signal is not None})
    plot = _plot(run.curve.plot)
    inputs = Inputs(run)
    # The part that `secateur prune` scores on, so that the same tolerance means the same plan.
    fit, _ = inputs.data.split()
    scores = sc.score(inputs.graph, fit, rule.signals, seed=run.seed)
    curve = rule.curve(inputs.graph, scores, limits_of(run))
    title = f"{type(inputs.model).__name__}, removal {rule.removal}, protection {rule.protection}"
    drawn = _drawn(plot, lambda path: draw(curve, path, title))
    return _tolerance_json(title, curve) if json else tolerance_table(title, curve, run.curve.rows) + drawn


def _tolerance_json(title: str, curve: Curve) -> str:
    """Return title and curve as JSON, with one line per entry."""
    found: dict[str, Any] = {"title": title, **curve.to_dict()}
    return (
        "{\n "
        + ",\n ".join(f"{json_format.dumps(k)}: {json_format.dumps(v)}" for k, v in found.items())
        + "\n}"
    )


def tolerance_table(title: str, curve: Curve, rows: int) -> str:
    """Return a table of at most `rows` points of the curve, for a terminal."""
    points = curve.spread(rows)
    macs, params = int(curve.macs[0]), int(curve.params[0])
    lines = [
        f"{title}: {number(params)} parameters, {number(macs)} MACs for one sample",
        f"{len(curve) - 1:,} tolerances change what goes; here are {len(points)} points.",
        "",
        f"{'tolerance':>9}  {'MACs':>7}  {'':20}  {'parameters':>10}  {'least kept':>10}  {'most kept':>9}  "
        "layer that keeps least",
    ]
    for point in points:
        shares = curve.kept[point] / curve.sizes
        least = int(shares.argmin())
        lines.append(
            f"{_knob(curve.knob[point]):>9}  {percent(curve.macs[point], macs):>7}  "
            f"{bar(int(curve.macs[point]), macs)}  {percent(curve.params[point], params):>10}  "
            f"{percent(shares[least], 1):>10}  {percent(shares.max(), 1):>9}  "
            + (curve.groups[least] if shares[least] < 1 else "")
        )
    return "\n".join(line.rstrip() for line in [*lines, "", *TOLERANCE_NOTES])


def _knob(knob: float) -> str:
    """Format a tolerance with four digits, rounded up, so that pruning with it reaches the point."""
    return "none" if math.isinf(knob) else f"{math.ceil(knob * 1e4) / 1e4:.4f}"


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
    from secateur.targets.weights.transition import sweep

    settings = run.transition
    plot = _plot(settings.plot)
    inputs = Inputs(run)
    fit, held = inputs.data.split()
    found = sweep(
        inputs.model,
        fit,
        inputs.evaluation or held,
        {name: name for name in settings.rules},
        sorted(settings.sparsities),
        criterion=settings.criterion,
        repair=settings.repair,
        share=settings.share,
        seed=run.seed,
    )
    title = f"{type(inputs.model).__name__}, {settings.criterion}, repaired by {settings.repair}"
    drawn = _drawn(plot, lambda path: _draw_transition(settings.rules, found, path, title))
    if json:
        return _transition_json(title, settings.rules, found)
    return transition_table(title, settings.rules, found) + drawn


def transition_table(title: str, rules: Sequence[str], found: Transition) -> str:
    """Return a table with a row per sparsity and a column per rule, and each rule's last good sparsity."""
    by_place = {(p.rule, p.sparsity): p for p in found.points}
    sparsities = sorted({place for _, place in by_place})
    wide = max(8, *(len(rule) for rule in rules))

    def cell(point: Point | None) -> str:
        if point is None:
            return "-"
        return f"{point.loss:.3f}" if point.accuracy is None else percent(point.accuracy, 1)

    def line(first: str, cells: Sequence[str]) -> str:
        return f"{first:>8}  " + "  ".join(f"{text:>{wide}}" for text in cells)

    dense = found.dense
    head = f"loss {dense.loss:.3f}" if dense.accuracy is None else f"top-1 {percent(dense.accuracy, 1)}"
    lines = [f"{title}; dense: {head} on {dense.samples:,} samples", "", line("sparsity", rules)]
    lines += [line(percent(s, 1), [cell(by_place.get((rule, s))) for rule in rules]) for s in sparsities]
    ends = [found.last(rule) for rule in rules]
    lines += ["", line("up to", ["none" if end is None else percent(end, 1) for end in ends])]
    lines.append(
        f"up to: the last sparsity, from the lowest on, at which {found.share:.0%} of the dense is kept."
    )
    return "\n".join(text.rstrip() for text in lines)


def _draw_transition(rules: Sequence[str], found: Transition, path: Path, title: str) -> None:
    """Draw accuracy (or loss) against sparsity, with one curve for each rule."""
    from matplotlib.figure import Figure

    from secateur.report.plot import save_figure

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
    save_figure(figure, path)


def _transition_json(title: str, rules: Sequence[str], found: Transition) -> str:
    content: Mapping[str, Any] = {
        "title": title,
        "dense": asdict(found.dense),
        "share": found.share,
        "last": {rule: found.last(rule) for rule in rules},
        "points": [asdict(point) for point in found.points],
    }
    return json_format.dumps(content, indent=1)
