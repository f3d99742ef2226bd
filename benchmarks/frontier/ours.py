"""secateur's rules at equal budgets, each followed by refitting every layer.

A seed's images are scored once and all rules plan from these scores; as in `sc.prune`, a fifth of the images
is held out from scoring and refitting, to judge. Refitting reads no labels; the signals that need labels get
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from time import process_time
from typing import Any

import secateur as sc
from benchmarks.frontier.entrant import Entrant, Made
from benchmarks.frontier.summary import AUTO, POLISH, SEARCH
from benchmarks.frontier.workload import Draw, Workload

SIDE = "secateur"
REPAIR = ("reconstruct",)
COMBINED = "magnitude*wasserstein"
"""What led `bench_signals` and `bench_repair`."""

TITLE = "magnitude x wasserstein"  # a star would be emphasis in a table

LABELLED = ("magnitude", "wasserstein", "taylor")
UNLABELLED = ("reconstruction",)

GRID: dict[str, sc.Allocator] = {
    "tod, wasserstein": sc.ToD(),
    f"tod, {TITLE}": sc.ToD(removal=COMBINED),
    f"emp, {TITLE}": sc.EMP(removal=COMBINED),
    f"global, {TITLE}": sc.Global(removal=COMBINED),
    f"uniform, {TITLE}": sc.Uniform(removal=COMBINED),
    "repair-aware, reconstruction": sc.RepairAware(),
}
"""Every rule with the removal signal that measured best with it, and ToD also with its own default."""

INNER = "repair-aware, streams whole"
"""`RepairAware` without the groups that several layers add to; only where there are such."""

MORE: dict[str, sc.Allocator] = {
    "emp, magnitude": sc.EMP(),
    "global, magnitude": sc.Global(),
    "uniform, magnitude": sc.Uniform(),
    "global, reconstruction": sc.Global(removal="reconstruction", normalise="none"),
}
"""The other rules' defaults, and what `RepairAware` reads, ranked without costs: run if asked for."""

VIEWS = 3
"""Views of each image that `polish` trains with."""

RULES = (*GRID, INNER, *MORE, AUTO, SEARCH, POLISH)
DEFAULT = (*GRID, INNER, AUTO)


class Scoring:
    """Scores of one draw at a time, gathered when a rule first asks; with and without labels apart."""

    def __init__(self, workload: Workload) -> None:
        self._workload = workload
        self._known: dict[tuple[int, bool], tuple[sc.Scores, float]] = {}

    def of(self, draw: Draw, rule: sc.Allocator) -> tuple[sc.Scores, float]:
        """Scores of at least what the rule needs, and the seconds that gathering them took."""
        labelled = rule.signals != UNLABELLED
        self._known = {key: value for key, value in self._known.items() if key[0] == draw.seed}
        key = (draw.seed, labelled)
        if key not in self._known:
            start = process_time()
            data, signals = (draw.labelled, LABELLED) if labelled else (draw.unlabelled, UNLABELLED)
            fit, _ = sc.Calibration.of(data).split()
            found = sc.score(self._workload.graph, fit, signals, seed=draw.seed, progress=False)
            self._known[key] = found, process_time() - start
        return self._known[key]


@dataclass(frozen=True)
class Fixed:
    """One rule with one removal signal."""

    workload: Workload
    scoring: Scoring
    name: str
    rule: sc.Allocator
    limits: sc.Limits = field(default_factory=sc.Limits)
    side: str = SIDE

    def made(self, draw: Draw, point: float) -> Made:
        """As pruned, and repaired."""
        work = self.workload
        scores, scoring = self.scoring.of(draw, self.rule)
        start = process_time()
        plan = self.rule.allocate(work.graph, scores, sc.Budget(macs=point), self.limits, draw.seed)
        small = sc.apply(work.model, plan, graph=work.graph, example_inputs=work.example).eval()
        planned = process_time()
        repaired = sc.repair(
            small, work.model, draw.unlabelled, REPAIR, graph=work.graph, seed=draw.seed, progress=False
        ).eval()
        seconds = {"score": scoring, "prune": planned - start, "repair": process_time() - planned}
        kept = {g.name: [g.kept, g.size] for g in plan.groups}
        notes = {"settings": dict(plan.settings), "kept": kept, "repairs": _kept(repaired)}
        return Made({"pruned": small, "repaired": repaired}, seconds, notes)


@dataclass(frozen=True)
class Whole:
    """The whole pipeline in one call, with an allocator that measures on its calibration images.

    Attributes:
        allocator: What decides. ``auto`` gets labels, as other rules do that read them.
        polish: Whether to train afterwards.
    """

    workload: Workload
    name: str
    allocator: str
    polish: bool = False
    side: str = SIDE

    def made(self, draw: Draw, point: float) -> Made:
        """Repaired; what came before repair is not kept."""
        work, start = self.workload, process_time()
        result = sc.prune(
            work.model,
            draw.labelled if self.allocator == AUTO else draw.unlabelled,
            sc.Budget(macs=point),
            self.allocator,
            repair="reconstruct" if self.allocator == SEARCH else "auto",
            measure_latency=False,
            seed=draw.seed,
            progress=False,
        )
        small, seconds = result.model, {"all": process_time() - start}
        if self.polish:
            views = sc.Calibration.of(draw.unlabelled, views=VIEWS)
            small = sc.repair(
                small, work.model, views, "polish", graph=work.graph, seed=draw.seed, progress=False
            )
            seconds["polish"] = process_time() - start - seconds["all"]
        contest = result.report.selection
        notes = {
            "chosen": contest.candidates[0].name if contest else None,
            "contest": contest.model_dump(mode="json") if contest else None,
            "settings": dict(result.plan.settings),
            "kept": {g.name: [g.kept, g.size] for g in result.plan.groups},
            "repairs": _kept(small),
        }
        return Made({"repaired": small.eval()}, seconds, notes)


def entrants(workload: Workload, names: Sequence[str] = DEFAULT) -> list[Entrant]:
    """The rules of these names."""
    scoring = Scoring(workload)
    found: list[Entrant] = [
        Fixed(workload, scoring, name, rule) for name, rule in (GRID | MORE).items() if name in names
    ]
    if INNER in names and workload.streams:
        limits = sc.Limits(ignore=workload.streams)
        found.append(Fixed(workload, scoring, INNER, sc.RepairAware(), limits))
    whole = {
        AUTO: Whole(workload, AUTO, AUTO),
        SEARCH: Whole(workload, SEARCH, SEARCH),
        POLISH: Whole(workload, POLISH, AUTO, polish=True),
    }
    return found + [entrant for name, entrant in whole.items() if name in names]


def named(asked: Sequence[str]) -> tuple[str, ...]:
    """Rules by their name, or by its first word: ``tod`` is every ToD, ``all`` all rules.

    Raises:
        ValueError: Nothing has this name.
    """
    unknown = [a for a in asked if a != "all" and not any(a in (n, n.split(",")[0]) for n in RULES)]
    if unknown:
        raise ValueError(f"expected rules among {'; '.join(RULES)}, got {'; '.join(unknown)}.")
    return tuple(n for n in RULES if {"all", n, n.split(",")[0]} & set(asked))


def _kept(model: Any) -> list[str]:
    return [str(r["method"]) for r in sc.record_of(model).repairs if r["kept"]]
