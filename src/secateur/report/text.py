"""Write a report as plain text for a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from secateur.common.formatting import percent, shorten
from secateur.common.inert import inert_line
from secateur.report import frontier, outcomes, proofs, quantised, selection, sentences

if TYPE_CHECKING:
    from secateur.report.data import Facts, Layer

WIDTH = 100
BAR = 20
MOST_LAYERS, MOST_REASONS = 40, 8


def table(report: Facts, *, reload: str = "") -> str:
    """Return the report as text: the table of figures, the layers, proof, repairs and settings.

    Nothing in it acts on a terminal, whatever names the model has.

    Args:
        report: The report's data.
        reload: Python code that loads the saved model. Default: made from the report.

    Returns:
        Lines of at most about 100 columns, without a newline at the end.
    """
    sections = [
        [sentences.headline(report)],
        _figures(report),
        [line for note in sentences.footnotes(report) for line in _wrap(note, "  ")],
        _quantised(report),
        _layers(report.layers),
        _bullets(frontier.title(report.frontier).lower(), frontier.lines(report.frontier))
        if report.frontier
        else [],
        _bullets("proof", (proofs.paragraph(report), sentences.form(report))),
        _bullets("sizes of the inputs", (report.takes,)) if report.takes else [],
        _bullets("rules that competed", selection.lines(report.selection)) if report.selection else [],
        _bullets("repair", sentences.repairs(report)),
        _left(report),
        _settings(report),
    ]
    if report.artefact is not None:
        how = reload or sentences.reloading(report)
        # Not wrapped: these lines are to be pasted.
        sections.append(
            [f"written to  {report.artefact}", "reload with", *(f"  {line}" for line in how.splitlines())]
        )
    return "\n\n".join("\n".join(map(inert_line, lines)) for lines in sections if lines)


def _figures(report: Facts) -> list[str]:
    """Return the header lines, then for each model its figures and, below, their comparison with dense."""
    columns = sentences.columns(report)
    lines = [["", *(c.title for c in columns)]]
    if any(c.unit for c in columns):
        lines.append(["", *(c.unit for c in columns)])
    for row in sentences.rows(report):
        lines.append([row.stage, *row.cells])
        if row.stage != "dense":
            lines.append(["", *row.relative])
    return aligned(lines)


def _quantised(report: Facts) -> list[str]:
    if report.quantised is None:
        return []
    notes = [line for each in quantised.sentences(report.quantised) for line in _wrap(each, "  ")]
    return [quantised.TITLE.lower(), *quantised.lines(report.quantised), *notes]


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Align cells into columns: the first column left, the others right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def _layers(layers: Sequence[Layer]) -> list[str]:
    shown = layers[:MOST_LAYERS]
    if not shown:
        return []
    named = [sentences.layer_name(layer) for layer in shown]
    width = max(len(name) for name in (*named, "layer"))
    digits = max(len(f"{layer.total:,}") for layer in shown)
    lines = [f"{'layer':{width}}  {'kept':>{digits}} / total"]
    for name, layer in zip(named, shown, strict=True):
        lines.append(
            f"{name:{width}}  {layer.kept:>{digits},} / {layer.total:<{max(digits, 5)},}  "
            f"{bar(layer.kept, layer.total)}  {percent(layer.kept, layer.total):>7}"
        )
    rest = layers[MOST_LAYERS:]
    if rest:
        kept, total = sum(layer.kept for layer in rest), sum(layer.total for layer in rest)
        lines.append(f"and {len(rest)} more that kept {kept:,} of {total:,} units; report.json has them all")
    return [*lines, *filter(None, [sentences.sharing(shown)])]


def bar(kept: int, total: int, width: int = BAR) -> str:
    """Draw the kept share as a bar of `width` characters.

    It is empty only if nothing is kept, and full only if everything is kept.

    Example:
        >>> bar(3, 4, width=8)
        '██████░░'
    """
    full = round(width * kept / total) if total else 0
    if 0 < kept < total:
        full = min(max(full, 1), width - 1)
    return "█" * full + "░" * (width - full)


def _left(report: Facts) -> list[str]:
    found = sentences.left(report)
    if not found:
        return []
    lines = [
        f"{part.reason}: {shorten(part.what)}" + (f" (at {shorten(part.where, 1)})" if part.where else "")
        for part in found[:MOST_REASONS]
    ]
    if len(found) > MOST_REASONS:
        lines.append(f"and {len(found) - MOST_REASONS} more reasons; report.json has them all")
    return _bullets("left as it was, and why", lines)


def _settings(report: Facts) -> list[str]:
    line = "; ".join(f"{name} {value}" for name, value in outcomes.settings(report))
    spent = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in report.seconds.items())
    return [*_wrap(f"settings: {line}", "", "  "), *_wrap(f"seconds: {spent}", "", "  ")]


def _bullets(title: str, lines: Iterable[str]) -> list[str]:
    return [title, *(part for line in lines if line for part in _wrap(line, "  ", "    "))]


def _wrap(line: str, first: str, later: str | None = None) -> list[str]:
    return textwrap.wrap(
        line,
        WIDTH,
        initial_indent=first,
        subsequent_indent=first if later is None else later,
        break_long_words=False,
        break_on_hyphens=False,
    )
