"""Choose the multiple that numbers of kept units are rounded to, by timing a plan for each multiple."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeGuard

import numpy as np
from torch import nn

from secateur.allocators import Budget, Limits
from secateur.allocators.limits import MEASURED
from secateur.calibration.subset import take_share
from secateur.errors import NothingToPruneError, SecateurError
from secateur.measure.latency.interval import median_ratio
from secateur.pipeline.auto.choose import FEW, LEAST, fixed, measured
from secateur.pipeline.bounds.measured_bounds import Latency
from secateur.pipeline.targets.target import Target
from secateur.repairs.judging import MARGIN, standard_errors
from secateur.signals import Scores
from secateur.signals.distributed import OF_THE_RUN, team_of_processes
from secateur.targets.granularity import UNITS, refusal

MULTIPLES = (1, 4, 8, 16, 32)

WORSE = 1.1
"""A plan is dropped if its error is above this times the smallest multiple's, and by more than noise."""


def is_measured(limits: Limits | None) -> TypeGuard[Limits]:
    """Whether the multiple is to be chosen by measurement."""
    return isinstance(limits, Limits) and limits.round_to == MEASURED


def finest(limits: Limits | None) -> Limits | None:
    """Return the limits with the multiple 1 in place of ``measured``, so that plans can be made."""
    return replace(limits, round_to=1) if is_measured(limits) else limits


def rounded(
    limits: Limits, target: Target, rule: Any, scores: Scores, budget: Budget | None, timed: Budget | None
) -> tuple[Limits, str]:
    """Choose the multiple; return the limits with it, and a note on what was measured.

    Each of `MULTIPLES` gives a plan for the same budget. Its model is repaired on a few samples and measured
    on held-out data. It is dropped if it is clearly worse than that of the smallest multiple (`WORSE`). The
    remaining models are timed in turn, on the first batch. A larger multiple replaces a smaller one if the
    95 % interval of the ratio of times lies below 1.

    Args:
        limits: The limits, with ``measured``.
        target: The target, with the model and the data.
        rule: The allocator.
        scores: The scores that it reads.
        budget: The counted budget; None lets the rule decide.
        timed: The budget whose settings say how to time models.

    Raises:
        SecateurError: No multiple gives a plan. It is the error for the smallest multiple.
    """
    task, judge = target.task, target.judge()
    timed = timed if timed is not None and timed.latency is not None else Budget(latency=0.5)
    few = take_share(task.fit, max(FEW, LEAST / task.fit.samples()), whole=fixed(target))
    found: dict[int, nn.Module] = {}
    plans: list[Any] = []
    reference: Any = None
    worse: list[int] = []
    first: SecateurError | None = None
    for multiple in MULTIPLES:
        try:
            plan = target.allocate(rule, scores, budget, replace(limits, round_to=multiple))
            if any(target.same(plan, other) for other in plans):
                continue
            plans.append(plan)
            errors = measured(target, judge, plan, few)
            if isinstance(errors, str):
                raise NothingToPruneError(f"prune: expected a model that runs, got none: {errors}")
            reference = errors if reference is None else reference
            noise = standard_errors(errors - reference) <= MARGIN
            if noise or float(errors.mean()) <= WORSE * float(reference.mean()):
                found[multiple] = target.apply(plan)
            else:
                worse.append(multiple)
        except OF_THE_RUN:
            raise
        except SecateurError as error:  # a large multiple may not reach the budget
            first = first or error
    if first is not None and not found:
        raise first
    clock = Latency(timed, task.model, task.example)
    with team_of_processes(target.graph.device) as team:
        best, shares = team.from_first(_fastest(found, clock))
    out = f" Worse on held-out data: {', '.join(map(str, worse))}." if worse else ""
    shown = ", ".join(f"{share:.2f} with multiples of {k}" for k, share in shares.items())
    return (
        replace(limits, round_to=best),
        f"Kept numbers are multiples of {best}. Time, {timed.backend}, over that of the first: {shown}.{out}",
    )


def _fastest(models: dict[int, nn.Module], clock: Latency) -> tuple[int, dict[int, float]]:
    """Return the multiple whose model is fastest, and each model's time divided by that of the first."""
    times = dict(zip(models, clock.times(*models.values()), strict=True))
    best = first = next(iter(times))
    for multiple, took in times.items():
        if median_ratio(took, times[best]).high < 1:
            best = multiple
    return best, {k: float(np.median(took) / np.median(times[first])) for k, took in times.items()}


def require_units(limits: Limits | None, granularity: str) -> None:
    """Check that multiples can change the speed: only units of layers change the sizes that kernels see.

    Raises:
        SettingError: The limits have ``measured``, and the granularity is another one.
    """
    if is_measured(limits) and granularity not in UNITS:
        why = "no kernel is faster for a multiple of them"
        raise refusal(f"prune(limits=Limits(round_to={MEASURED!r}))", granularity, why)
