"""Write a report as Markdown, for a pull request, a model card or a notebook."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from secateur.common.formatting import percent
from secateur.common.inert import inert
from secateur.report import frontier, outcomes, proofs, quantised, selection, sentences

if TYPE_CHECKING:
    from secateur.report.data import Facts, Knob

SHADES = "·▁▂▃▄▅▆▇█"
CURVE_ROWS = 12


def document(report: Facts) -> str:
    """Return the report as one Markdown text. All names and messages from the model are escaped.

    Args:
        report: The report's data.
    """
    parts = [part for section in _SECTIONS for part in section(report)]
    return inert(f"# {escape(report.model)}, pruned\n\n" + "\n\n".join(filter(None, parts)) + "\n")


def escape(text: str) -> str:
    r"""Escape a text so that Markdown shows it literally, and join its lines.

    Example:
        >>> print(escape("layer_1 <b> | *x*"))
        layer\_1 \<b\> \| \*x\*
    """
    return re.sub(r"([\\`*_{}\[\]<>#|!~$&])", r"\\\1", " ".join(text.split()))


def grid(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table. The first column is aligned left, the others right."""
    lines = [titles, ["---", *["---:"] * (len(titles) - 1)]]
    lines += [[escape(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def spark(counts: Sequence[int], most: int) -> str:
    """Draw counts as bars of one character each. A dot means zero; the tallest bar means `most`.

    Example:
        >>> spark([0, 1, 4, 8], 8)
        '·▁▄█'
    """
    return "".join(SHADES[-(-8 * count // max(most, 1))] for count in counts)


def _summary(report: Facts) -> Iterator[str]:
    yield escape(f"Asked for {outcomes.asked(report)}.")
    yield grid(
        ("what", "asked", "achieved"), [(b.what, b.asked, b.achieved) for b in outcomes.outcomes(report)]
    )


def _figures(report: Facts) -> Iterator[str]:
    yield "## Before and after"
    titles = [" ".join(filter(None, (c.title, c.unit and f"[{c.unit}]"))) for c in sentences.columns(report)]
    yield grid(
        ("model", *titles),
        [
            (
                row.stage,
                *(
                    cell if row.stage == "dense" else f"{cell}, {relative}"
                    for cell, relative in zip(row.cells, row.relative, strict=True)
                ),
            )
            for row in sentences.rows(report)
        ],
    )
    yield from map(escape, sentences.footnotes(report))


def _quantised(report: Facts) -> Iterator[str]:
    if report.quantised is not None:
        yield f"## {quantised.TITLE}"
        yield grid(quantised.titles(report.quantised), quantised.rows(report.quantised))
        yield from map(escape, quantised.sentences(report.quantised))


def _layers(report: Facts) -> Iterator[str]:
    if not report.layers:
        return
    yield "## What each layer kept"
    yield grid(
        ("layer", "kept", "removed", "of", "kept, %"),
        [
            (
                sentences.layer_name(layer),
                f"{layer.kept:,}",
                f"{layer.total - layer.kept:,}",
                f"{layer.total:,}",
                percent(layer.kept, layer.total),
            )
            for layer in report.layers
        ],
    )
    yield escape(sentences.sharing(report.layers))


def _knob(report: Facts) -> Iterator[str]:
    curve = report.knob
    if curve is None:
        return
    yield f"## What every {escape(sentences.rule(report).knob)} would leave"
    yield grid(
        (escape(sentences.rule(report).knob), "MACs", "parameters", ""),
        [
            (
                "none" if i == 0 else f"{curve.values[i - 1]:.4g}",
                percent(curve.macs[i], curve.macs[0]),
                percent(curve.params[i], curve.params[0]),
                "the plan" if curve.at is not None and i == curve.at + 1 else "",
            )
            for i in _sampled_points(curve)
        ],
    )
    yield escape(sentences.knob(report))


def _sampled_points(curve: Knob) -> list[int]:
    """Return indices of about `CURVE_ROWS` evenly spread points of the curve, and of the plan's point."""
    last = len(curve.values)
    found = {round(k * last / (CURVE_ROWS - 1)) for k in range(CURVE_ROWS)}
    return sorted(found if curve.at is None else found | {curve.at + 1})


def _scores(report: Facts) -> Iterator[str]:
    found = sentences.scored(report)
    if not found:
        return
    yield "## What the units were worth, and the cut"
    yield grid(
        ("layer", "signal", "lowest", "highest", "cut", "removed", "kept"),
        [
            (
                layer.group,
                " ".join(
                    filter(None, (h.signal, f"({use})" if (use := sentences.role(report, h.signal)) else ""))
                ),
                f"{h.edges[0]:.3g}",
                f"{h.edges[-1]:.3g}",
                "–" if h.cut is None else f"{h.cut:.3g}",
                *(spark(counts, max(*h.kept, *h.removed)) for counts in (h.removed, h.kept)),
            )
            for layer, h in found
        ],
    )
    yield escape(
        "Units by score, from the lowest to the highest; the cut is the lowest score that stays, where all "
        "that go score no more."
    )


def _frontier(report: Facts) -> Iterator[str]:
    if report.frontier is None:
        return
    yield f"## {escape(frontier.title(report.frontier))}"
    yield grid([escape(t) for t in frontier.titles(report.frontier)], frontier.rows(report.frontier))
    yield from map(escape, frontier.sentences(report.frontier))


def _proof(report: Facts) -> Iterator[str]:
    yield "## Proof"
    yield escape(proofs.paragraph(report))
    yield escape(sentences.form(report))


def _takes(report: Facts) -> Iterator[str]:
    if report.takes:
        yield "## Sizes of the inputs"
        yield escape(report.takes)


def _selection(report: Facts) -> Iterator[str]:
    if report.selection is None:
        return
    yield "## Rules that competed"
    yield grid(selection.titles(report.selection), selection.rows(report.selection))
    yield escape(selection.sentence(report.selection))


def _repairs(report: Facts) -> Iterator[str]:
    yield "## Repair"
    yield _list(sentences.repairs(report))
    for refit in sentences.refits(report):
        yield f"### Error of each layer before and after {escape(refit.method)}"
        yield grid(
            ("layer", "before", "after"), [(name, f"{b:.3g}", f"{a:.3g}") for name, b, a in refit.rows]
        )
        yield escape(sentences.REFIT)


def _certificate(report: Facts) -> Iterator[str]:
    found = sentences.rule(report).certificate
    if found is None:
        return
    yield "## What the rule guarantees or predicts"
    yield from map(escape, found.sentences)
    if found.rows:
        yield grid(found.titles, found.rows)
        yield escape(found.note)


def _left(report: Facts) -> Iterator[str]:
    yield "## What was left as it was, and why"
    found = sentences.left(report)
    if not found:
        yield "Nothing: every layer was open to pruning."
        return
    yield _list(
        f"{part.reason}: {', '.join(part.what)}" + (f" (at {', '.join(part.where)})" if part.where else "")
        for part in found
    )


def _settings(report: Facts) -> Iterator[str]:
    yield "## Settings"
    yield grid(("setting", "value"), outcomes.settings(report))
    yield "## Run"
    yield grid(
        ("what", "value"),
        [
            *((phase, f"{seconds:.2f} s") for phase, seconds in report.seconds.items()),
            *report.versions.items(),
        ],
    )


def _reload(report: Facts) -> Iterator[str]:
    code = sentences.reloading(report)
    if code:
        yield "## Load it again"
        yield escape(f"Written to {report.artefact}.")
        yield "\n".join(f"    {line}" for line in code.splitlines())


def _list(lines: Iterable[str]) -> str:
    return "\n".join(f"- {escape(line)}" for line in lines)


_SECTIONS = (
    _summary,
    _figures,
    _quantised,
    _frontier,
    _layers,
    _knob,
    _scores,
    _proof,
    _takes,
    _selection,
    _repairs,
    _certificate,
    _left,
    _settings,
    _reload,
)
"""The sections in reading order. Each yields paragraphs; none if it has nothing to say."""
