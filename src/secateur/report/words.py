"""A report's figures and findings in words, shared by the text and the HTML page."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from secateur.report.report import Figures, Layer, Report

MINUS, ENOUGH = "\N{MINUS SIGN}", 3


def number(value: int) -> str:
    """A count, exact below ten million and with four digits above.

    Example:
        >>> number(78_042), number(40_813_184), number(4_089_184_256)
        ('78,042', '40.81 M', '4.089 G')
    """
    for size, unit in ((1_000_000_000, "G"), (10_000_000, "M")):
        if value >= size:
            return f"{value / (1_000_000 if unit == 'M' else size):.4g} {unit}"
    return f"{value:,}"


def percent(part: float, whole: float) -> str:
    """`part` as a percentage of `whole`; a dash where that means nothing.

    Example:
        >>> percent(1, 3), percent(1, 0)
        ('33.3 %', '–')
    """
    if not whole or not math.isfinite(part) or not math.isfinite(whole):
        return "–"
    share = 100 * part / whole
    return f"{share:,.0f} %" if abs(share) >= 1000 else f"{share:.1f} %"


def milliseconds(seconds: float) -> str:
    """Seconds as milliseconds, with about three digits that count.

    Example:
        >>> milliseconds(0.00123), milliseconds(0.0456)
        ('1.23 ms', '45.6 ms')
    """
    return f"{1e3 * seconds:,.{_places(1e3 * seconds)}f} ms"


def shorten(names: Iterable[str], most: int = ENOUGH) -> str:
    """The first names, and how many more there are.

    Example:
        >>> shorten(["a", "b", "c", "d"])
        'a, b, c and 1 more'
    """
    names = list(names)
    line = ", ".join(names[:most])
    return line if len(names) <= most else f"{line} and {len(names) - most} more"


def quoted(text: str) -> str:
    """A Python literal of `text`, in double quotes."""
    return json.dumps(text, ensure_ascii=False)


def loading(artefact: str) -> str:
    """Python that loads an artefact, given `make_model`."""
    return f"import secateur as sc\nmodel = sc.load({quoted(artefact)}, make_model)"


@dataclass(frozen=True)
class Column:
    """One quantity of the table.

    Attributes:
        title: What it is.
        unit: Its unit, empty where the cells carry it or there is none.
    """

    title: str
    unit: str = ""


@dataclass(frozen=True)
class Row:
    """One model.

    Attributes:
        stage: ``dense``, ``pruned`` or ``repaired``.
        cells: A text for each column.
        relative: The same relative to dense: percentages, for accuracy the difference in points.
    """

    stage: str
    cells: tuple[str, ...]
    relative: tuple[str, ...]


def columns(report: Report) -> tuple[Column, ...]:
    """The quantities that were measured, in reading order."""
    found = [Column("parameters"), Column("MACs"), Column("weights", "MB")]
    found.insert(0, Column("loss" if report.figures[0].measure == "loss" else "distance"))
    if any(f.accuracy is not None for f in report.figures):
        found.insert(0, Column("accuracy"))
    if any(f.latency is not None for f in report.figures):
        found.append(Column("latency", "ms (quartiles)"))
    return tuple(found)


def rows(report: Report) -> tuple[Row, ...]:
    """The models, a cell for each of `columns`."""
    dense = report.figures[0]
    titles = [column.title for column in columns(report)]
    made = []
    for figures in report.figures:
        cells = [_cell(title, figures, dense) for title in titles]
        made.append(Row(figures.stage, tuple(a for a, _ in cells), tuple(b for _, b in cells)))
    return tuple(made)


def _cell(title: str, own: Figures, dense: Figures) -> tuple[str, str]:
    """A value, and the same relative to dense."""
    if title == "accuracy":
        return _accuracy(own.accuracy), _points(own.accuracy, dense.accuracy)
    if title in ("loss", "distance"):
        return _loss(own.loss), percent(own.loss, dense.loss)
    if title == "parameters":
        return number(own.params), percent(own.params, dense.params)
    if title == "MACs":
        return number(own.macs), percent(own.macs, dense.macs)
    if title == "weights":
        return f"{own.weight_bytes / 1e6:,.{_places(dense.weight_bytes / 1e6)}f}", percent(
            own.weight_bytes, dense.weight_bytes
        )
    if own.latency is None:
        return "–", "–"
    places = _places(1e3 * (dense.latency or own.latency))
    text = f"{1e3 * own.latency:.{places}f}"
    if own.latency_quartiles is not None:
        low, high = own.latency_quartiles
        text += f" ({1e3 * low:.{places}f}–{1e3 * high:.{places}f})"
    return text, percent(own.latency, dense.latency or 0)


def _loss(value: float | None) -> str:
    """JSON has no NaN: a report that was read back holds None for it."""
    return "not finite" if value is None or not math.isfinite(value) else f"{value:.4g}"


def _accuracy(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f} %"


def _points(value: float | None, dense: float | None) -> str:
    if value is None or dense is None:
        return "–"
    points = round(100 * (value - dense), 2)
    return f"{'+' if points > 0 else MINUS if points < 0 else '±'}{abs(points):.2f}"


def _places(size: float) -> int:
    """Digits behind the point that leave about three that count."""
    return 3 if size < 1 else 2 if size < 10 else 1 if size < 100 else 0


def headline(report: Report) -> str:
    """The result in one line."""
    dense, best = report.figures[0], report.figures[-1]
    line = f"{report.model}: {percent(best.macs, dense.macs)} of its MACs"
    if dense.accuracy is not None and best.accuracy is not None:
        line += f", accuracy {_accuracy(dense.accuracy)} before, {_accuracy(best.accuracy)} after"
    return line


def footnotes(report: Report) -> tuple[str, ...]:
    """What the table's figures mean."""
    dense = report.figures[0]
    measured = "Accuracy (top-1) and loss" if dense.accuracy is not None else "Loss"
    if dense.measure != "loss":
        measured = "Without labels, the squared distance to the dense model's outputs relative to their size"
    notes = [
        f"{measured}: {report.judged_on}. With each figure its percentage of dense"
        + (", for accuracy the difference in points." if dense.accuracy is not None else "."),
        "MACs: multiply-accumulates for one sample, half of FLOPs. "
        "Weights: parameters and buffers in memory, 1 MB = 1,000,000 bytes.",
    ]
    if dense.latency is not None:
        samples = "one sample" if dense.latency_batch == 1 else f"a batch of {dense.latency_batch}"
        notes.append(f"Latency: median and quartiles of forward passes of {samples}, on this machine.")
        if report.figures[-1].stage == "repaired":
            notes.append(
                "Repair changes numbers, not shapes: costs and latency are those of the pruned model."
            )
    if report.form == "masked":
        notes.append(
            "The form is masked: the units are zeroed, not taken out. "
            "Parameters and MACs are those that taking them out would leave."
        )
    return tuple(notes)


def layer_name(layer: Layer) -> str:
    """The group, and how many more layers produce the same units."""
    more = _others(layer)
    return f"{layer.group} (+{more})" if more else layer.group


def _others(layer: Layer) -> int:
    return max(0, len({tensor.rpartition(".")[0] for tensor in layer.producers}) - 1)


def sharing(layers: Iterable[Layer]) -> str:
    """What (+n) behind a layer's name means; empty where none has it."""
    shared = any(_others(layer) for layer in layers)
    return "(+n): n more layers produce the same units, which only go together." if shared else ""


MIXED = (
    " Some removed units were mixed with others by an operator without weights, such as a layer norm: what "
    "the others compute changes with the removal, on purpose, and only the measured accuracy says how much "
    "that costs."
)
"""What the removal of inexact groups means."""


def proof(report: Report) -> str:
    """What was proven, in a sentence."""
    found = report.proof
    if report.asked.get("granularity") == "weight":
        return (
            "Before repair, the pruned model is the dense model with exactly the masked weights at zero: its "
            f"{found['outputs']} tensors were compared bit for bit."
        )
    references = {
        "masked": "the dense model with the same units zeroed",
        "experts excluded": "the dense model whose routers may not choose the removed experts",
    }
    reference = references.get(str(found["reference"]), "the captured program with the same units cut out")
    count = found["outputs"]
    outputs = "its output differs" if count == 1 else f"its {count} outputs differ"
    return (
        f"Before repair, the pruned model computes what {reference} computes: on real samples in float64 "
        f"{outputs} by {found['difference']:.1e} relative (allowed: {found['tolerance']:.0e})."
        + ("" if found["reference"] in references else MIXED)
    )


def form(report: Report) -> str:
    """What the result is, in a sentence."""
    if report.asked.get("granularity") == "weight":
        return f"The result has the dense model's shapes: {report.note}. Zeros are multiplied like the rest."
    what = {
        "module": "The result has the same classes with smaller tensors (form module).",
        "graph": "The result is the captured program with smaller tensors (form graph).",
        "masked": "The result is the dense model with zeroed units (form masked).",
    }.get(report.form, f"The result has the form {report.form}.")
    if not report.note:
        return what
    why = (
        report.note[0].upper() + report.note[1:]
        if report.form == "module"
        else f"Why not a module: {report.note}"
    )
    return f"{what} {why}"


def repairs(report: Report) -> tuple[str, ...]:
    """What repair tried and what it brought, a line each."""
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
            f"{_loss(tried['after'])} after, on {tried['held_out_samples']} held-out calibration samples."
        )
    if not any(tried["kept"] for tried in report.repairs):
        lines.append("Nothing that was tried helped: the model is as pruning left it.")
    return tuple(lines)


def settings(report: Report) -> tuple[tuple[str, str], ...]:
    """Name and value of what decided: what was asked for, and what was solved for it."""
    budget = report.asked.get("budget")
    found = [("allocator", str(report.asked.get("allocator"))), ("budget", _budget(budget))]
    for name, value in report.settings.items():
        if name != "limits":
            found.append((name, _setting(value, solved=bool(budget) and name in ("tolerance", "ratio"))))
    limits = report.settings.get("limits")
    if isinstance(limits, Mapping):
        found += [(name, _setting(value)) for name, value in limits.items() if value not in ([], None)]
    found.append(("seed", str(report.asked.get("seed"))))
    return tuple(found)


def asked(report: Report) -> str:
    """What the user wanted, in a phrase."""
    repair = report.asked.get("repair")
    named = (
        "none" if repair is None else ", ".join(map(str, repair)) if isinstance(repair, list) else str(repair)
    )
    budget = report.asked.get("budget")
    wanted = _budget(budget) if budget else "no budget"
    return f"{wanted}, allocator {report.asked.get('allocator')}, repair {named}"


def _budget(budget: Any) -> str:
    if not isinstance(budget, Mapping) or not budget:
        return "none, the allocator decided"
    return " and ".join(
        f"at most {f'{value:,}' if isinstance(value, int) else f'{100 * value:g} % of the'} "
        f"{'MACs' if name == 'macs' else 'parameters' if name == 'params' else name}"
        for name, value in budget.items()
        if name != "spend"
    ) + (", as far as the rule's knob alone goes" if budget.get("spend") is False else "")


def _setting(value: Any, *, solved: bool = False) -> str:
    if value is None:
        return "not needed, nothing had to go" if solved else "none"
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    if isinstance(value, list):
        text = ", ".join(map(str, value))
    return f"{text}, solved for the budget" if solved else text


@dataclass(frozen=True)
class Left:
    """Parts that stay for one reason."""

    reason: str
    what: tuple[str, ...]
    where: tuple[str, ...]


def left(report: Report) -> tuple[Left, ...]:
    """What could not be pruned, by reason, in order of first appearance."""
    by_reason: dict[str, list[Any]] = {}
    for kept in report.untouched:
        by_reason.setdefault(kept.reason, []).append(kept)
    return tuple(
        Left(reason, tuple(k.what for k in kept), tuple(dict.fromkeys(k.where for k in kept if k.where)))
        for reason, kept in by_reason.items()
    )


@dataclass(frozen=True)
class Certificate:
    """What the allocator vouches for.

    Attributes:
        words: What it says, a sentence each.
        note: What the table's columns mean.
        titles: Columns of the table.
        rows: Per layer, a cell for each column.
        raw: JSON, where the certificate is of an unknown kind; then there are no words.
    """

    words: tuple[str, ...] = ()
    note: str = ""
    titles: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    raw: str = ""


def certificate(report: Report) -> Certificate | None:
    """The certificates of the plan in words; None if there are none."""
    found: Mapping[str, Any] = report.certificates
    if not found:
        return None
    groups = found.get("groups")
    known = isinstance(groups, Mapping) and all(
        isinstance(g, Mapping) and {"removed", "overlap", "overlap_bound", "mass", "mass_bound"} <= set(g)
        for g in groups.values()
    )
    if report.asked.get("allocator") != "tod" or not known or not groups:
        return Certificate(raw=json.dumps(found, indent=1, ensure_ascii=False))
    if found.get("tolerance") is None:
        return Certificate(words=("Nothing had to go, so there is nothing to vouch for.",))
    tolerance = float(found["tolerance"])
    removed = sum(g["removed"] for g in groups.values())
    overlap = sum(g["overlap"] for g in groups.values())
    bound = sum(g["overlap_bound"] for g in groups.values())
    words = (
        f"Tolerance of Difference {tolerance:.4g}: of the k units that a layer lost, at most "
        f"{100 * tolerance:.3g} % are among the k of that layer that the protection signal values most.",
        f"Over all layers {removed:,} units went; {overlap:,} of them were among those, and "
        f"{bound:,} was the limit.",
    )
    exchange = found.get("exchange")
    compared = exchange["groups"] if isinstance(exchange, Mapping) else {}
    return Certificate(
        words=(*words, *_given_back(groups), *_exchange(exchange), *_constant(found.get("constant"))),
        note=(
            "Score gone and at most are shares of a layer's whole protection score: what went with the "
            "removed units, and the most that this tolerance lets go."
            + (
                " Uniform removes so many units; exchange is what the difference adds to or takes off the "
                "additive loss, in % of the whole network's protection score."
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
                _share(g["mass"]),
                _share(g["mass_bound"]),
                *_exchanged(compared.get(name)),
            )
            for name, g in groups.items()
        ),
    )


def _given_back(groups: Mapping[str, Any]) -> tuple[str, ...]:
    """Units that stay although the tolerance lets them go."""
    kept = sum(g.get("allowed", g["removed"]) - g["removed"] for g in groups.values())
    if not kept:
        return ()
    return (
        f"{kept:,} {'unit' if kept == 1 else 'units'} that this tolerance lets go stayed, to spend the "
        "budget. k counts them too: the limits are those of the tolerance, and fewer units went.",
    )


def _exchange(found: Any) -> tuple[str, ...]:
    """The comparison with uniform, and what it assumes."""
    if not isinstance(found, Mapping) or found.get("loss") is None:
        return ()
    own, other = found["macs"]
    loss, before = found["loss"], found["other_loss"]
    outcome = "lowers" if loss < before else "raises" if loss > before else "leaves"
    return (
        f"Uniform pruning by the same removal signal within the same budget leaves {number(other)} MACs "
        f"({number(own)} here). Against it, this plan removes units that hold {_share(found['taken'])} of "
        f"the network's protection score, and keeps units that hold {_share(found['spared'])}. That exchange "
        f"{outcome} the protection score removed "
        + (f"from {_share(before)} to {_share(loss)}." if outcome != "leaves" else f"at {_share(loss)}."),
        "This speaks of damage as far as damage adds up over the removed units and protection scores "
        "measure it on one scale in all layers: no interplay between units, no repair. Measured accuracy "
        "decides.",
    )


def _exchanged(found: Mapping[str, Any] | None) -> tuple[str, ...]:
    """The cells of one layer: what uniform removes, and what the difference does to the additive loss."""
    if found is None:
        return ()
    removed = f"{found['other_removed']:,}"
    if found["taken"] is None:
        return removed, "–"
    change = 100 * (found["taken"] - found["spared"])
    sign = "+" if change > 0 else MINUS if change < 0 else "±"
    return removed, f"{sign}{abs(change):.2f}"


def _constant(found: Any) -> tuple[str, ...]:
    """Layers whose units a signal cannot tell apart."""
    if not found:
        return ()
    signals = sorted({signal for flat in found.values() for signal in flat})
    return (
        f"In {shorten(found)} every unit has the same score from {' and '.join(signals)}: how many units "
        "went there follows from their position, not from what they are worth.",
    )


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"
