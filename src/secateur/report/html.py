"""Write a report as one self-contained HTML page, without scripts, fonts, image files or network access."""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import TYPE_CHECKING

from secateur.common.formatting import milliseconds, number, percent, shorten
from secateur.common.inert import inert
from secateur.errors import SettingError
from secateur.report import frontier, outcomes, proofs, quantised, selection, sentences, shapes

if TYPE_CHECKING:
    from jinja2 import Template

    from secateur.report.data import Facts

TEMPLATE, STYLE = "page.html.j2", "page.css"

MOST_LAYERS = 24
"""If there are more layers than this, their histograms are folded and open with one click."""


def render(report: Facts, *, reload: str = "") -> str:
    """Return the page as a string. All names and messages from the model are escaped.

    Args:
        report: The report's data.
        reload: Python code that loads the saved model. Default: made from the report.

    Raises:
        SettingError: If Jinja is missing.
    """
    try:
        import jinja2  # noqa: F401 before the template that was kept
    except ImportError as error:
        raise SettingError(
            f'report: expected Jinja, which writes the page, got {error}. Run pip install "secateur[report]".'
        ) from error
    strips, times = shapes.strips(report)
    page = _template().render(
        report=report,
        style=_text(STYLE),
        sentences=sentences,
        number=number,
        percent=percent,
        shorten=shorten,
        proof=proofs.paragraph(report),
        outcomes=outcomes,
        shapes=shapes,
        selection=selection,
        frontier=frontier,
        quantised=quantised,
        frontier_plot=frontier.plot(report.frontier),
        tiles=tiles(report),
        columns=sentences.columns(report),
        rows=sentences.rows(report),
        strips=strips,
        times=times,
        knob_plot=shapes.knob_plot(report),
        certificate=sentences.rule(report).certificate,
        most_layers=MOST_LAYERS,
        reload=reload or sentences.reloading(report),
    )
    return inert(page)


@cache
def _template() -> Template:
    """Compile the page, which takes longer than to fill it."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(_text(TEMPLATE))


def _text(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def tiles(report: Facts) -> tuple[tuple[str, str, str], ...]:
    """Return the headline figures as (name, figure, comparison with the dense model)."""
    dense, best = report.figures[0], report.figures[-1]
    found: list[tuple[str, str, str]] = []
    rows = sentences.rows(report)
    for i, column in enumerate(sentences.columns(report)):
        before, after = rows[0].cells[i], rows[-1].cells[i]
        if column.title == "accuracy":
            found.append(("accuracy", after, f"{before} before"))
        elif column.title in ("MACs", "parameters", "weights"):
            unit = f" {column.unit}" if column.unit else ""
            found.append((column.title, rows[-1].relative[i], f"{after} of {before}{unit}"))
    if dense.latency is not None and best.latency is not None:
        found.append(
            (
                "latency",
                percent(best.latency, dense.latency),
                f"{milliseconds(best.latency)} of {milliseconds(dense.latency)}"
                + (", spreads overlap" if sentences.same_speed(report) else ""),
            )
        )
    return tuple(found)
