"""From runs to means: one row for each entrant and stage, with a cell for each point."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

OURS = "secateur"
AUTO, SEARCH, POLISH = COLUMNS = "auto", "search", "polish"
"""Entrants of ours with a column of their own. ``polish`` trains what ``auto`` gives, without labels."""

COMES, REFRESHED, REPAIRED = "pruned", "batchnorm", "repaired"

BEHIND, OURS_BEHIND = 3.0, 1.0
"""Points of top-1: a peer, and a rule of ours, further behind the best of its kind at the first seed does not
run on the others. Ours differ less from draw to draw, since refitting mends much."""


@dataclass(frozen=True)
class Cell:
    """One entrant at one point.

    Attributes:
        by_seed: Top-1 by seed, in percent.
        macs: Mean share of the dense MACs.
        params: Mean share of the dense parameters.
        seconds: Median over seeds of all steps together, processor time.
    """

    by_seed: Mapping[int, float]
    macs: float
    params: float
    seconds: float

    @property
    def mean(self) -> float:
        """Over seeds."""
        return statistics.mean(self.by_seed.values())

    @property
    def spread(self) -> float:
        """Standard deviation over seeds; 0 for one seed."""
        values = list(self.by_seed.values())
        return statistics.stdev(values) if len(values) > 1 else 0.0

    def __str__(self) -> str:
        spread = f" ± {self.spread:.1f}" if len(self.by_seed) > 1 else ""
        return f"{self.mean:.1f}{spread}"


@dataclass(frozen=True)
class Row:
    """One entrant at one stage.

    Attributes:
        side: Whose.
        rule: Its name.
        stage: ``pruned``, ``batchnorm`` or ``repaired``.
        cells: By point; points at which it failed for some seed are missing.
        errors: By point, what it failed with.
    """

    side: str
    rule: str
    stage: str
    cells: Mapping[float, Cell]
    errors: Mapping[float, str]


def rows(content: Mapping[str, Any]) -> list[Row]:
    """All rows of a result file, in the order of its runs."""
    found = []
    runs: Sequence[Mapping[str, Any]] = content["runs"]
    for side, rule in dict.fromkeys((r["side"], r["rule"]) for r in runs):
        mine = [r for r in runs if (r["side"], r["rule"]) == (side, rule)]
        errors = {r["point"]: r["error"] for r in mine if "error" in r}
        good = [r for r in mine if r["point"] not in errors]
        stages = dict.fromkeys(stage for r in good for stage in r["top1"]) or {COMES: None}
        for stage in stages:
            cells = {
                point: _cell([r for r in good if r["point"] == point], stage)
                for point in dict.fromkeys(r["point"] for r in good)
            }
            found.append(Row(side, rule, stage, cells, errors))
    return found


def _cell(runs: Sequence[Mapping[str, Any]], stage: str) -> Cell:
    return Cell(
        {r["seed"]: 100 * r["top1"][stage] for r in runs},
        statistics.mean(r["macs"] for r in runs),
        statistics.mean(r["params"] for r in runs),
        statistics.median(sum(r["seconds"].values()) for r in runs),
    )


def points(content: Mapping[str, Any]) -> list[float]:
    """Shares of the MACs asked for, the largest first."""
    return sorted({r["point"] for r in content["runs"]}, reverse=True)


def best(of: Iterable[Row], point: float) -> Row | None:
    """The row with the highest mean at a point; of equal ones the first."""
    there = [row for row in of if point in row.cells]
    return max(there, key=lambda row: row.cells[point].mean, default=None)


@dataclass(frozen=True)
class Contest:
    """Who leads at one point of one network.

    Attributes:
        auto: The choice by measurement.
        search: The allocation that was searched for.
        polish: The choice by measurement, trained.
        fixed: The best single rule of ours, repaired.
        comes: The best peer as it comes.
        given: The best peer with its batch norms re-estimated, where it has any.
    """

    auto: Row | None
    search: Row | None
    polish: Row | None
    fixed: Row | None
    comes: Row | None
    given: Row | None

    def all(self) -> list[Row]:
        """Those that there are."""
        return [row for row in vars(self).values() if row is not None]


def contest(of: Sequence[Row], point: float) -> Contest:
    """The best of each kind at a point, chosen by the test images themselves, ours as theirs."""
    ours = [row for row in of if row.side == OURS and row.stage == REPAIRED]
    theirs = [row for row in of if row.side != OURS]
    refreshed = {(row.side, row.rule) for row in theirs if row.stage == REFRESHED}
    kinds = (
        *([row for row in ours if row.rule == name] for name in COLUMNS),
        [row for row in ours if row.rule not in COLUMNS],
        [row for row in theirs if row.stage == COMES],
        [row for row in theirs if row.stage == REFRESHED or (row.side, row.rule) not in refreshed],
    )
    return Contest(*(best(_on_most_draws(kind, point), point) for kind in kinds))


def _on_most_draws(of: Sequence[Row], point: float) -> list[Row]:
    """Those that ran on as many draws as any: others did not come near at the first one."""
    there = [row for row in of if point in row.cells]
    most = max((len(row.cells[point].by_seed) for row in there), default=0)
    return [row for row in there if len(row.cells[point].by_seed) == most]


def standard_error(one: Cell, other: Cell) -> float:
    """Of the mean difference between two entrants, over the seeds that both have; 0 for one seed."""
    both = [one.by_seed[s] - other.by_seed[s] for s in one.by_seed if s in other.by_seed]
    return statistics.stdev(both) / len(both) ** 0.5 if len(both) > 1 else 0.0
