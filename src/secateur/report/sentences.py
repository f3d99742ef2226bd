"""The sentences and table cells of a report. Text, HTML and Markdown share them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from secateur.allocators.description import Description
from secateur.allocators.registry import describe
from secateur.common.formatting import MINUS, number, percent, places
from secateur.measure.measures import LOSS, MEASURES

if TYPE_CHECKING:
    from secateur.report.data import Facts, Figures, Histogram, Layer


def quoted(text: str) -> str:
    """Return a Python string literal of `text`, in double quotes."""
    return json.dumps(text, ensure_ascii=False)


def loading(artefact: str, make_model: str = "") -> str:
    """Return Python code that loads an artefact.

    Args:
        artefact: The artefact's folder.
        make_model: The line of code that defines ``make_model``; left out if empty.
    """
    lines = ("import secateur as sc", make_model, f"model = sc.load({quoted(artefact)}, make_model)")
    return "\n".join(filter(None, lines))


def reloading(report: Facts) -> str:
    """Return Python code that loads the saved model; empty if it was not saved.

    The line of a report from elsewhere is somebody else's code: it is a comment, with its origin.
    """
    if report.artefact is None:
        return ""
    if not report.origin or not report.make_model:
        return loading(report.artefact, report.make_model)
    foreign = "\n".join(f"# {line}" for line in report.make_model.splitlines())
    return loading(report.artefact, f"# from {report.origin}; read it before you run it:\n{foreign}")


@dataclass(frozen=True)
class Column:
    """One column of the table of figures.

    Attributes:
        title: The quantity's name.
        unit: Its unit; empty if the cells show it or there is none.
    """

    title: str
    unit: str = ""


@dataclass(frozen=True)
class Row:
    """One row of the table of figures: one model.

    Attributes:
        stage: ``dense``, ``pruned`` or ``repaired``.
        cells: The value of each column, as text.
        relative: Each value compared with dense, as text: a percentage, or for accuracy the
            difference in percentage points.
    """

    stage: str
    cells: tuple[str, ...]
    relative: tuple[str, ...]


def columns(report: Facts) -> tuple[Column, ...]:
    """Return the columns of the table of figures: the quantities that were measured."""
    found = [Column("parameters"), Column("MACs"), Column("weights", "MB")]
    found.insert(0, Column(report.figures[0].measure.partition(" ")[0]))
    if any(f.accuracy is not None for f in report.figures):
        found.insert(0, Column("accuracy"))
    if any(f.latency is not None for f in report.figures):
        found.append(Column("latency", "ms (quartiles)"))
    return tuple(found)


def rows(report: Facts) -> tuple[Row, ...]:
    """Return the rows of the table of figures: one for each model, with a cell for each of `columns`."""
    dense = report.figures[0]
    titles = [column.title for column in columns(report)]
    made = []
    for figures in report.figures:
        cells = [_cell(title, figures, dense) for title in titles]
        made.append(Row(figures.stage, tuple(a for a, _ in cells), tuple(b for _, b in cells)))
    return tuple(made)


def _cell(title: str, own: Figures, dense: Figures) -> tuple[str, str]:
    """Return a cell's value and its comparison with dense, both as text."""
    if title == "accuracy":
        return _accuracy(own.accuracy), _points(own.accuracy, dense.accuracy)
    if title in ("loss", "distance", "divergence"):
        return _loss(own.loss), percent(own.loss, dense.loss)
    if title == "parameters":
        return number(own.params), percent(own.params, dense.params)
    if title == "MACs":
        return number(own.macs), percent(own.macs, dense.macs)
    if title == "weights":
        return f"{own.weight_bytes / 1e6:,.{places(dense.weight_bytes / 1e6)}f}", percent(
            own.weight_bytes, dense.weight_bytes
        )
    if own.latency is None:
        return "–", "–"
    digits = places(1e3 * (dense.latency or own.latency))
    text = f"{1e3 * own.latency:.{digits}f}"
    if own.latency_quartiles is not None:
        low, high = own.latency_quartiles
        text += f" ({1e3 * low:.{digits}f}–{1e3 * high:.{digits}f})"
    return text, percent(own.latency, dense.latency or 0)


def _loss(value: Any) -> str:
    """Format a loss. It may be the text ``NaN`` in a report that was read from JSON."""
    finite = isinstance(value, int | float) and math.isfinite(value)
    return f"{value:.4g}" if finite else "not finite"


def _accuracy(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f} %"


def _points(value: float | None, dense: float | None) -> str:
    if value is None or dense is None:
        return "–"
    points = round(100 * (value - dense), 2)
    return f"{'+' if points > 0 else MINUS if points < 0 else '±'}{abs(points):.2f}"


def headline(report: Facts) -> str:
    """Return the result in one line: model, share of MACs left, accuracy before and after."""
    dense, best = report.figures[0], report.figures[-1]
    line = f"{report.model}: {percent(best.macs, dense.macs)} of its MACs"
    if dense.accuracy is not None and best.accuracy is not None:
        line += f", accuracy {_accuracy(dense.accuracy)} before, {_accuracy(best.accuracy)} after"
    return line


def footnotes(report: Facts) -> tuple[str, ...]:
    """Return notes that explain the table of figures."""
    dense = report.figures[0]
    measured = "Accuracy (top-1) and loss" if dense.accuracy is not None else "Loss"
    if dense.measure != LOSS:
        measured = f"Without labels, {MEASURES.get(dense.measure, dense.measure)}"
    notes = [
        f"{measured}: {report.judged_on}. With each figure its percentage of dense"
        + (", for accuracy the difference in points." if dense.accuracy is not None else "."),
        "MACs: multiply-accumulates for one sample, half of FLOPs. "
        "Weights: parameters and buffers in memory, 1 MB = 1,000,000 bytes.",
    ]
    notes += interval(report)
    notes += [note for note in (report.lacking, report.rounding) if note]
    if dense.latency is not None:
        samples = "one sample" if dense.latency_batch == 1 else f"a batch of {dense.latency_batch}"
        notes.append(
            f"Latency: median and quartiles of forward passes of {samples}, on the machine that pruned. "
            + speed(report)
        )
        if report.figures[-1].stage == "repaired":
            notes.append(
                "Repair changes numbers, not shapes: costs and latency are those of the pruned model."
            )
    if report.form == "masked" and report.asked.get("granularity") == "weight":
        notes.append(
            "The form is masked: single weights are zero, shapes and MACs are the dense model's. "
            "Parameters are those that are not zero."
        )
    elif report.form == "masked":
        notes.append(
            "The form is masked: the units are zeroed, not taken out. "
            "Parameters and MACs are those that taking them out would leave."
        )
    return tuple(notes)


def interval(report: Facts) -> tuple[str, ...]:
    """Return a note with the 95 % interval of each model's accuracy; empty without accuracy."""
    found = [
        f"{f.stage} {100 * low:.2f} to {100 * high:.2f} %"
        for f in report.figures
        if f.accuracy is not None and f.samples
        for low, high in [wilson(f.accuracy, f.samples)]
    ]
    if not found:
        return ()
    samples = report.figures[0].samples or 0
    return (
        f"Accuracy was measured on {samples:,} {'sample' if samples == 1 else 'samples'}. "
        f"95 % interval of each model for itself (Wilson): {', '.join(found)}.",
    )


def wilson(share: float, samples: int, z: float = 1.959964) -> tuple[float, float]:
    """Return the Wilson confidence interval (low, high) of a probability.

    Source: Wilson 1927, Probable inference, the law of succession, and statistical inference.

    Args:
        share: The observed share of successes, in [0, 1].
        samples: The number of samples, at least 1.
        z: Quantile of the normal distribution; 1.96 for 95 %.

    Example:
        >>> [round(bound, 3) for bound in wilson(0.9, 100)]
        [0.826, 0.945]
    """
    spread = z * z / samples
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(spread * (share * (1 - share) + spread / 4)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def speed(report: Facts) -> str:
    """Say in one sentence whether the final model is faster than the dense one; empty if not timed."""
    dense, best = report.figures[0], report.figures[-1]
    if dense.latency is None or best.latency is None or not best.latency:
        return ""
    factor = dense.latency / best.latency
    if same_speed(report):
        return "The spreads overlap: this measurement shows no gain in speed."
    if factor > 1:
        return f"The pruned model is {factor:.2f} times as fast."
    return f"The pruned model is slower: it takes {1 / factor:.2f} times as long."


def same_speed(report: Facts) -> bool:
    """Whether the interquartile ranges of the latency before and after overlap."""
    before, after = report.figures[0].latency_quartiles, report.figures[-1].latency_quartiles
    return before is not None and after is not None and before[0] <= after[1] and after[0] <= before[1]


def layer_name(layer: Layer) -> str:
    """Return the group's name and, as (+n), how many other layers produce the same units."""
    more = _others(layer)
    return f"{layer.group} (+{more})" if more else layer.group


def _others(layer: Layer) -> int:
    return max(0, len({tensor.rpartition(".")[0] for tensor in layer.producers}) - 1)


def sharing(layers: Iterable[Layer]) -> str:
    """Explain the (+n) behind layer names; empty if no layer has it."""
    shared = any(_others(layer) for layer in layers)
    return "(+n): n more layers produce the same units, which only go together." if shared else ""


def form(report: Facts) -> str:
    """Describe the form of the result, and the attributes that were changed."""
    if report.asked.get("granularity") == "weight":
        return f"The result has the dense model's shapes: {report.note}. Zeros are multiplied like the rest."
    axes = str(report.asked.get("granularity")).split("+")
    ways = ["with smaller tensors"] * (axes != ["block"]) + ["without the dropped blocks"] * ("block" in axes)
    smaller = " and ".join(ways)
    what = {
        "module": f"The result has the same classes {smaller} (form module).",
        "graph": "The result is the captured program with smaller tensors (form graph).",
        "masked": "The result is the dense model with zeroed units (form masked).",
    }.get(report.form, f"The result has the form {report.form}.")
    if report.note:
        what += f" {report.note[0].upper()}{report.note[1:]}"
    return what + attributes(report)


def attributes(report: Facts, most: int = 8) -> str:
    """Name the attributes that were set to new sizes. Layers that differ only by number share an entry.

    Args:
        report: The report's data.
        most: Most entries to name.
    """
    alike: dict[str, dict[str, None]] = {}
    for path, value in report.attributes.items():
        alike.setdefault(re.sub(r"\d+", "*", path), {})[str(value)] = None
    shown = [f"{path} = {' or '.join(list(values)[:3])}" for path, values in sorted(alike.items())[:most]]
    more = f" and {len(alike) - most} more, which the JSON lists" if len(alike) > most else ""
    return f" Numbers that follow: {', '.join(shown)}{more}." if shown else ""


def repairs(report: Facts) -> tuple[str, ...]:
    """Return one line for each repair that was tried: its error before and after, and if it was kept."""
    if not report.repairs:
        return ("None was asked for." if report.asked.get("repair") is None else "None was tried.",)
    lines = []
    for tried in report.repairs:
        outcome = "kept" if tried["kept"] else "not kept"
        if "why" in tried:
            lines.append(f"{tried['method']}: not done, {tried['why']}.")
            continue
        lines.append(
            f"{tried['method']}: {outcome}; {tried['measure']} {_loss(tried['before'])} before and "
            f"{_loss(tried['after'])} after, on {tried['held_out_samples']} held-out calibration samples"
            + training(tried)
            + (f"; tried on about {tried['fitted_on']} samples only." if "fitted_on" in tried else ".")
            + (" Then fitted on all samples." if "fitted_on_all" in tried else "")
        )
    if not any(tried["kept"] for tried in report.repairs):
        lines.append("Nothing that was tried helped: the model is as pruning left it.")
    return tuple(lines)


def training(tried: Mapping[str, Any]) -> str:
    """Return how long a repair trained, to go at the end of a line about it; empty if it did not."""
    return f"; {tried['passes']} passes, {tried['minutes']:.1f} minutes" if "passes" in tried else ""


@dataclass(frozen=True)
class Refit:
    """The effect of a repair on each layer.

    Attributes:
        method: The repair's name.
        rows: (weight, error before, error after) for each weight. The error is the squared error of the
            layer's output, divided by the scatter of its target.
    """

    method: str
    rows: tuple[tuple[str, float, float], ...]


REFIT = (
    "Squared error of each layer's output, given the layers before it as repaired, as a share of the scatter "
    "of what the output should be: as pruning left the layer, and refitted. The second is measured on data "
    "that the fit did not see."
)


def refits(report: Facts) -> tuple[Refit, ...]:
    """Return the kept repairs that report their effect on each layer.

    A combination such as ``reconstruct + batchnorm`` first ran ``reconstruct`` alone, which has its own
    entry. So every beginning of a combination is looked up too.
    """
    tried = {str(entry["method"]): entry for entry in report.repairs}
    found: dict[str, Refit] = {}
    for name in (str(entry["method"]) for entry in report.repairs if entry["kept"]):
        parts = name.split(" + ")
        for count in range(1, len(parts) + 1):
            start = " + ".join(parts[:count])
            rows = _refitted(tried.get(start, {}).get("layers"))
            if rows:
                found[start] = Refit(start, rows)
    return tuple(found.values())


def _refitted(layers: Any) -> tuple[tuple[str, float, float], ...]:
    if not isinstance(layers, Mapping):
        return ()
    return tuple(
        (str(name), float(entry["before"]), float(entry["after"]))
        for name, entry in layers.items()
        if {"before", "after"} <= set(entry)
    )


def rule(report: Facts) -> Description:
    """Return how the rule describes its decision. For an old report it is made from the rule's name."""
    return report.description or describe(
        report.rule or str(report.asked.get("allocator")), report.certificates
    )


def knob(report: Facts) -> str:
    """Describe the cost curve of the knob and the plan's place on it; empty if there is no curve."""
    curve = report.knob
    if curve is None:
        return ""
    best, name = report.figures[-1], rule(report).knob
    where = (
        "Nothing had to go"
        if curve.at is None
        else f"The plan's {name} is {curve.values[curve.at]:.4g}, which leaves "
        f"{percent(curve.macs[curve.at + 1], curve.macs[0])} of the MACs"
    )
    if curve.at is not None and best.macs != curve.macs[curve.at + 1]:
        where += f"; units that came back to spend the budget make it {percent(best.macs, curve.macs[0])}"
    return (
        f"{where}. All from one scoring: every other {name} is a plan too, and none leaves less than "
        f"{percent(curve.macs[-1], curve.macs[0])}."
    )


def role(report: Facts, signal: str) -> str:
    """Return what the allocator uses a signal for: ``removal``, ``protection``, both, or empty."""
    uses = [use for use in ("removal", "protection") if report.settings.get(use) == signal]
    return " and ".join(uses)


def scored(report: Facts) -> tuple[tuple[Layer, Histogram], ...]:
    """Return every histogram together with its layer."""
    return tuple((layer, found) for layer in report.layers for found in layer.scores)


@dataclass(frozen=True)
class Left:
    """Parts of the model that could not be pruned for one and the same reason.

    Attributes:
        reason: The reason.
        what: Names of the parts.
        where: The places in the model that are the reason.
    """

    reason: str
    what: tuple[str, ...]
    where: tuple[str, ...]


def left(report: Facts) -> tuple[Left, ...]:
    """Return the parts that could not be pruned, grouped by reason, in order of first appearance."""
    by_reason: dict[str, list[Any]] = {}
    for kept in report.untouched:
        by_reason.setdefault(kept.reason, []).append(kept)
    return tuple(
        Left(reason, tuple(k.what for k in kept), tuple(dict.fromkeys(k.where for k in kept if k.where)))
        for reason, kept in by_reason.items()
    )
