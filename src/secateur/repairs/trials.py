"""Try repairs and measure their error: one after another, or combinations against each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from secateur.calibration.subset import take_share
from secateur.errors import SecateurError
from secateur.repairs import resuming
from secateur.repairs.judging import MARGIN, Judge, standard_errors
from secateur.repairs.methods import Method, Work
from secateur.signals.distributed import OF_THE_RUN
from secateur.targets.units.copying import duplicate

NOTHING = "the model has nothing that it could change"

FIRST_SAMPLES = 64
"""If there are many more samples, all combinations are first compared on about this many."""

PLENTY = 4
"""The first comparison takes place if there are at least this many times `FIRST_SAMPLES` samples."""

FINALISTS = 2
"""At most this many combinations then run on all samples. Clearly worse ones (`MARGIN`) do not."""


@dataclass(frozen=True, eq=False)
class Trial:
    """The models after a repair, and their errors.

    Attributes:
        models: One model for each fold.
        errors: The errors of all folds' held-out samples, one fold after the other. [samples]
        notes: What the repair returned for the last fold; it goes into the record.
        methods: All repairs that the models went through, in order.
    """

    models: list[nn.Module]
    errors: NDArray[np.float64]
    notes: dict[str, Any] = field(default_factory=dict)
    methods: tuple[Method, ...] = ()

    @property
    def error(self) -> float:
        """The mean error."""
        return float(self.errors.mean())

    def better_than(self, other: Trial) -> bool:
        """Whether this mean error is smaller than the other's. An error that is not finite never is."""
        return math.isfinite(self.error) and (self.error < other.error or not math.isfinite(other.error))


class Trials:
    """Runs repairs on every fold. Each fold has its own data to fit on, and its own judge."""

    def __init__(self, folds: Sequence[tuple[Work, Judge]]) -> None:
        self.folds = folds

    def measured(self, models: list[nn.Module]) -> Trial:
        """Measure one model per fold, each on the held-out data of its fold."""
        return Trial(models, resuming.judged(models, [judge for _, judge in self.folds]))

    def attempt(self, start: Trial, method: Method) -> Trial | str:
        """Repair copies of a trial's models and measure them. Return the reason if the repair fails."""
        models, notes = [], None
        for model, (work, _) in zip(start.models, self.folds, strict=True):
            candidate = duplicate(model)
            try:
                notes = resuming.run(method, candidate, work)
            except OF_THE_RUN:
                raise
            except SecateurError as error:
                return str(error)
            models.append(candidate)
        if notes is None:
            return NOTHING
        return replace(self.measured(models), notes=notes, methods=(*start.methods, method))

    def part(self) -> Trials | None:
        """Return trials on about `FIRST_SAMPLES` samples; None if there are not many more samples."""
        (work, judge), *more = self.folds
        samples = 0 if more else work.data.samples()
        if samples < PLENTY * FIRST_SAMPLES:
            return None
        whole = work.graph().static_batch is not None
        few = take_share(work.data, FIRST_SAMPLES / samples, whole=whole)
        judge = judge.on_part(FIRST_SAMPLES, whole=whole)
        return Trials([(replace(work, data=few, progress=False, judge=judge), judge)])

    def best(
        self, start: Trial, combinations: tuple[tuple[Method, ...], ...]
    ) -> tuple[tuple[tuple[Method, ...], ...], list[dict[str, Any]]]:
        """Select the combinations that should run on all samples.

        Returns:
            The best `FINALISTS` combinations, without those that are clearly worse than the best; and
            the record entries of all others.
        """
        done = self.results(start, combinations)
        names = [tuple(method.name for method in methods) for methods in combinations]
        trials = {k: found for k, n in enumerate(names) if isinstance(found := done[n], Trial)}
        order = sorted(trials, key=lambda k: e if math.isfinite(e := trials[k].error) else math.inf)
        finalists = {
            k
            for k in order[:FINALISTS]
            if not standard_errors(trials[k].errors - trials[order[0]].errors) > MARGIN
        }
        rejected = [
            self._entry(" + ".join(names[k]), start, done[names[k]], kept=False, layers=False)
            | {"fitted_on": FIRST_SAMPLES}
            for k in (*order, *sorted({*range(len(names))} - {*order}))
            if k not in finalists
        ]
        return tuple(methods for k, methods in enumerate(combinations) if k in finalists), rejected

    def chain(self, start: Trial, methods: Sequence[Method]) -> tuple[Trial, list[dict[str, Any]]]:
        """Run the methods one after another; keep each one that lowers the error."""
        best, tried = start, []
        for method in methods:
            after = self.attempt(best, method)
            helps = isinstance(after, Trial) and after.better_than(best)
            tried.append(self._entry(method.name, best, after, kept=helps))
            if isinstance(after, Trial) and helps:
                best = after
        return best, tried

    def results(
        self, start: Trial, combinations: Sequence[Sequence[Method]]
    ) -> dict[tuple[str, ...], Trial | str]:
        """Run each combination. Return the trial, or the reason of failure, by the names of its methods.

        Combinations that begin with the same methods share that work.
        """
        done: dict[tuple[str, ...], Trial | str] = {(): start}
        for methods in combinations:
            names: tuple[str, ...] = ()
            for method in methods:
                before, names = done[names], (*names, method.name)
                if names not in done:
                    done[names] = before if isinstance(before, str) else self.attempt(before, method)
        return done

    def compare(
        self, start: Trial, combinations: Sequence[Sequence[Method]]
    ) -> tuple[Trial, list[dict[str, Any]]]:
        """Return the best of several combinations (`start` if none is better), and the record entries."""
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
        """Return the record entry of one trial. `layers` includes the notes on each layer."""
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
