"""Show several runs beside each other: what was asked, costs and quality, and what each layer kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING

from secateur.common.formatting import milliseconds, number, percent
from secateur.common.inert import inert, inert_line
from secateur.errors import SettingError
from secateur.report import outcomes, sentences
from secateur.report.text import aligned, bar

if TYPE_CHECKING:
    from secateur.report.data import Facts, Layer

TEMPLATE, STYLE = "runs.html.j2", "page.css"
TITLES = ("run", "asked for", "rule", "MACs", "parameters", "quality", "dense", "latency", "seconds")


@dataclass(frozen=True)
class Bar:
    """What one run kept of one layer.

    Attributes:
        run: The run's name.
        kept: Units that it kept.
        total: Units of the dense model.
    """

    run: str
    kept: int
    total: int


@dataclass(frozen=True, eq=False)
class Runs:
    """Reports of several runs, by name. ``print(runs)`` shows the tables, `html` is one page.

    Attributes:
        reports: The reports, in the order in which they are shown.
    """

    reports: tuple[tuple[str, Facts], ...]

    @classmethod
    def of(cls, reports: Sequence[tuple[str, Facts]]) -> Runs:
        """Check that there is something to compare.

        Raises:
            SettingError: There are fewer than two runs, or two of one name.
        """
        names = [name for name, _ in reports]
        if len(names) < 2 or len(set(names)) < len(names):
            raise SettingError(
                f"compare-runs: expected at least two runs, each once, got {', '.join(names) or 'none'}. "
                "Name the folders that prune wrote."
            )
        return cls(tuple(reports))

    def rows(self) -> tuple[tuple[str, ...], ...]:
        """Return the cells of each run, in the order of `TITLES`."""
        return tuple(_cells(name, report) for name, report in self.reports)

    def layers(self) -> tuple[tuple[str, tuple[Bar, ...]], ...]:
        """Return what the runs kept of each layer that any of them has, in the order of the first."""
        known: dict[str, list[Bar]] = {}
        labels: dict[str, str] = {}
        for name, report in self.reports:
            for layer in report.layers:
                labels.setdefault(layer.group, sentences.layer_name(layer))
                known.setdefault(layer.group, []).append(_bar(name, layer))
        return tuple((labels[group], tuple(bars)) for group, bars in known.items())

    def doubts(self) -> tuple[str, ...]:
        """Say what makes the runs hard to compare."""
        facts = [report for _, report in self.reports]
        dense = {(f.model, f.figures[0].params, f.figures[0].macs) for f in facts}
        judged = {(f.judged_on, f.figures[-1].samples, f.figures[-1].measure) for f in facts}
        found = []
        if len(dense) > 1:
            found.append("The dense models differ, so costs and quality are of different networks.")
        if len(judged) > 1:
            where = (
                f"{name}: {f.judged_on}, {f.figures[-1].samples or '?'} samples" for name, f in self.reports
            )
            found.append(f"Quality was measured on different data: {'; '.join(where)}.")
        elif len({f.figures[0].loss for f in facts}) > 1 and len(dense) == 1:
            found.append("The dense models reach different losses: their weights or the data differ.")
        if sum(f.figures[-1].latency is not None for f in facts) > 1:
            found.append("Latencies were measured in different runs; compare each with its own dense model.")
        return tuple(found)

    def __str__(self) -> str:
        """Return the tables as text."""
        lines = [*aligned([TITLES, *self.rows()]), *(f"  {line}" for line in self.doubts())]
        width = max(len(name) for name, _ in self.reports)
        for label, bars in self.layers():
            lines += ["", label]
            lines += [
                f"  {each.run:{width}}  {each.kept:>6,} / {each.total:<6,}  {bar(each.kept, each.total)}  "
                f"{percent(each.kept, each.total):>7}"
                for each in bars
            ]
        return "\n".join(map(inert_line, lines))

    def html(self) -> str:
        """Return one self-contained page. All names are escaped.

        Raises:
            SettingError: Jinja is missing.
        """
        try:
            from jinja2 import Environment, StrictUndefined
        except ImportError as error:
            raise SettingError(
                f"compare-runs: expected Jinja, which writes the page, got {error}. Run pip install "
                '"secateur[report]".'
            ) from error
        environment = Environment(
            autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )
        page = environment.from_string(_text(TEMPLATE)).render(
            style=_text(STYLE), titles=TITLES, runs=self, number=number, percent=percent
        )
        return inert(page)


def _text(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _bar(name: str, layer: Layer) -> Bar:
    return Bar(name, layer.kept, layer.total)


def _cells(name: str, report: Facts) -> tuple[str, ...]:
    dense, best = report.figures[0], report.figures[-1]
    shown = [
        f"{each.loss:.4g}" if each.accuracy is None else f"{100 * each.accuracy:.2f} %"
        for each in (best, dense)
    ]
    if best.accuracy is None:
        shown[0] += f" ({best.measure})"
    latency = "–" if best.latency is None or dense.latency is None else (
        f"{milliseconds(best.latency)}, {percent(best.latency, dense.latency)}"
    )  # fmt: skip
    return (
        name,
        outcomes.asked(report),
        report.rule or str(report.asked.get("allocator")),
        percent(best.macs, dense.macs),
        percent(best.params, dense.params),
        *shown,
        latency,
        f"{sum(report.seconds.values()):.0f}",
    )
