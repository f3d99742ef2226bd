"""Repairs tried and measured: one after another, or combinations against each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from secateur.apply.copying import duplicate
from secateur.calibration.thinning import thinned
from secateur.errors import SecateurError
from secateur.repair.judging import MARGIN, Judge, standard_errors
from secateur.repair.methods import Repair, Work

NOTHING = "the model has nothing that it could change"

FIRST_SAMPLES = 64
"""About how many samples all combinations run on first, where there are many more."""

PLENTY = 4
"""There are many more samples where there are this many times `FIRST_SAMPLES`."""

FINALISTS = 2
"""How many combinations then run on all samples; fewer, if all others are clearly worse (`MARGIN`)."""


@dataclass(frozen=True, eq=False)
class Trial:
    """A model for each fold, and how they measure; `notes` say what was done to the last."""

    models: list[nn.Module]
    errors: NDArray[np.float64]
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def error(self) -> float:
        """The mean."""
        return float(self.errors.mean())

    def better_than(self, other: Trial) -> bool:
        """Whether it measures better; what is not finite never does."""
        return math.isfinite(self.error) and (self.error < other.error or not math.isfinite(other.error))


class Trials:
    """Repairs tried, each fold's on its own data and judged by its own judge."""

    def __init__(self, folds: Sequence[tuple[Work, Judge]]) -> None:
        self.folds = folds

    def measured(self, models: list[nn.Module], notes: dict[str, Any] | None = None) -> Trial:
        """Each model judged on what its fold holds out."""
        errors = np.concatenate([judge(m) for m, (_, judge) in zip(models, self.folds, strict=True)])
        return Trial(models, errors, notes or {})

    def attempt(self, start: Trial, method: Repair) -> Trial | str:
        """The repaired models, or why there are none."""
        models, notes = [], None
        for model, (work, _) in zip(start.models, self.folds, strict=True):
            candidate = duplicate(model)
            try:
                notes = method.run(candidate, work)
            except SecateurError as error:
                return str(error)
            models.append(candidate)
        return NOTHING if notes is None else self.measured(models, notes)

    def part(self) -> Trials | None:
        """Trials on a part of the data that is enough to tell good from bad; None if there is little more."""
        (work, judge), *more = self.folds
        samples = 0 if more else sum(batch.size for batch in work.data)
        if samples < PLENTY * FIRST_SAMPLES:
            return None
        whole = work.graph().static_batch is not None
        few = thinned(work.data, FIRST_SAMPLES / samples, whole=whole)
        return Trials([(replace(work, data=few, progress=False), judge.on_part(FIRST_SAMPLES, whole=whole))])

    def best(
        self, start: Trial, combinations: tuple[tuple[Repair, ...], ...]
    ) -> tuple[tuple[tuple[Repair, ...], ...], list[dict[str, Any]]]:
        """The best combinations that none is clearly better than, and the record of the others."""
        done = self.results(start, combinations)
        names = [tuple(method.name for method in methods) for methods in combinations]
        trials = {k: found for k, n in enumerate(names) if isinstance(found := done[n], Trial)}
        order = sorted(trials, key=lambda k: e if math.isfinite(e := trials[k].error) else math.inf)
        stay = {
            k
            for k in order[:FINALISTS]
            if not standard_errors(trials[k].errors - trials[order[0]].errors) > MARGIN
        }
        behind = [
            self._entry(" + ".join(names[k]), start, done[names[k]], kept=False, layers=False)
            | {"fitted_on": FIRST_SAMPLES}
            for k in (*order, *sorted({*range(len(names))} - {*order}))
            if k not in stay
        ]
        return tuple(methods for k, methods in enumerate(combinations) if k in stay), behind

    def chain(self, start: Trial, methods: Sequence[Repair]) -> tuple[Trial, list[dict[str, Any]]]:
        """The methods one after another, each kept if it helps."""
        best, tried = start, []
        for method in methods:
            after = self.attempt(best, method)
            helps = isinstance(after, Trial) and after.better_than(best)
            tried.append(self._entry(method.name, best, after, kept=helps))
            if isinstance(after, Trial) and helps:
                best = after
        return best, tried

    def results(
        self, start: Trial, combinations: Sequence[Sequence[Repair]]
    ) -> dict[tuple[str, ...], Trial | str]:
        """What each combination, and each beginning of one, comes to; or why to nothing."""
        done: dict[tuple[str, ...], Trial | str] = {(): start}
        for methods in combinations:
            names: tuple[str, ...] = ()
            for method in methods:
                before, names = done[names], (*names, method.name)
                if names not in done:
                    done[names] = before if isinstance(before, str) else self.attempt(before, method)
        return done

    def compare(
        self, start: Trial, combinations: Sequence[Sequence[Repair]]
    ) -> tuple[Trial, list[dict[str, Any]]]:
        """The best of several combinations, or `start` if none is better."""
        done = self.results(start, combinations)
        names = [tuple(method.name for method in methods) for methods in combinations]
        best = start
        chosen: tuple[str, ...] = ()
        for name in names:
            after = done[name]
            if isinstance(after, Trial) and after.better_than(best):
                best, chosen = after, name
        return best, [self._entry(" + ".join(n), start, done[n], kept=n == chosen) for n in names]

    def _entry(
        self, name: str, before: Trial, after: Trial | str, *, kept: bool, layers: bool = True
    ) -> dict[str, Any]:
        """What the record says of one trial, with or without each layer of it."""
        if isinstance(after, str):
            return {"method": name, "kept": False, "why": after}
        return {
            "method": name,
            "kept": kept,
            "measure": self.folds[0][1].measure,
            "before": before.error,
            "after": after.error,
            "held_out_samples": sum(judge.samples for _, judge in self.folds),
            **{key: value for key, value in after.notes.items() if layers or key != "layers"},
        }
