"""Meet a budget: by counting alone, or by looking at pruned models."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pydantic import JsonValue
from torch import nn

from secateur.allocators import Budget
from secateur.calibration import Calibration
from secateur.common.formatting import percent
from secateur.common.progress import Step, steps
from secateur.errors import BudgetError, SecateurError, UnreachableBudgetError
from secateur.measure.latency.interval import Interval
from secateur.measure.quality import Gauge
from secateur.pipeline.bounds.bisection import bisect
from secateur.pipeline.bounds.ceilings import Ceiling, ceilings_of
from secateur.pipeline.bounds.frontier import Frontier
from secateur.pipeline.bounds.plans import COUNTED, Plans
from secateur.pipeline.bounds.quality import Looks, cheapest, roughly
from secateur.pipeline.targets.target import Scored, Target
from secateur.plan import Plan
from secateur.signals import Scores
from secateur.signals.distributed import OF_THE_RUN, joined
from secateur.signals.units.combination import name_of
from secateur.targets.units.record import attach, record_of

PROBES = 8
"""Most plans that are measured for bounds on time and memory. Each one halves what is left."""


@dataclass(frozen=True, eq=False)
class Met:
    """A model within the budget.

    Attributes:
        small: The pruned model.
        plan: Its plan. ``settings["met"]`` holds what was measured.
        repaired: The same after its repair; None where that was not needed to decide.
        looks: The models that were measured on held-out data; None where none was.
    """

    small: nn.Module
    plan: Any
    repaired: nn.Module | None = None
    looks: Looks | None = None


@dataclass(frozen=True, eq=False)
class Held:
    """The data that decide on quality, and how it is measured.

    Attributes:
        gauge: Measures on these data, which nothing else reads.
        of: The same with other data.
    """

    gauge: Gauge
    of: Callable[[Calibration], Gauge]


def meet(target: Target, rule: Any, scores: Scores, budget: Budget | None, held: Held | None = None) -> Met:
    """Plan and prune within all bounds of a budget.

    Without measured bounds it is the rule's plan. With bounds on latency or memory it is the largest model
    that is within; with bounds on quality the smallest one that is confirmed to be.

    Args:
        target: What is removed.
        rule: The allocator, with the curves it measured.
        scores: The scores that it reads.
        budget: All bounds.
        held: Needed for bounds on quality.

    Raises:
        UnreachableBudgetError: No plan that was looked at is within all bounds.
        BudgetError: There are bounds on quality, but nothing to measure it with.
    """
    if budget is None or not budget.measured:
        return Met(*target.plan_and_apply(rule, scores, budget))
    plans = Plans(target, rule, scores, budget)
    _check_counted(plans)
    with steps(None, target.task.progress) as step:
        if not budget.quality:
            return _largest(plans, step)[0]
        if held is None:
            raise BudgetError(
                f"budget: expected bounds on cost alone, got {budget.quality[0]}, which is decided on "
                "held-out data. Use secateur.prune."
            )
        return _smallest(plans, held, step)


def candidates_budget(
    target: Target, budget: Budget, known: Scored, rules: Iterable[Any], held: Held | None
) -> Budget:
    """The counted budget at which rules compete: what the first that can run meets of the measured bounds.

    A budget without measured bounds is returned as it is.
    """
    if not budget.measured:
        return budget
    missed: SecateurError | None = None
    for rule in rules:
        if any(name_of(signal) in known.missing for signal in rule.signals):
            continue
        try:
            plans = Plans(
                target, target.with_measurements(rule, target.task.fit, known.scores), known.scores, budget
            )
            _check_counted(plans)
            with steps(None, target.task.progress) as step:
                if budget.quality and held is not None:
                    return plans.counted(roughly(plans, held.gauge.samples, held.of, step))
                return plans.counted(_largest(plans, step)[1])
        except OF_THE_RUN:
            raise
        except SecateurError as error:
            missed = missed or error
    if missed is not None:
        raise missed
    raise BudgetError(
        f"budget: expected a rule that can run, to meet {', '.join(budget.measured)}, got none. Pass macs=, "
        "for example."
    )


def _check_counted(plans: Plans) -> None:
    """Refuse counted bounds that cannot be met before anything is measured."""
    if any(getattr(plans.budget, name) is not None for name in COUNTED):
        plans.plan(plans.most)


def _largest(plans: Plans, step: Step) -> tuple[Met, float]:
    """The largest model within the bounds on time and memory, and the share that its plan keeps."""
    target, task = plans.target, plans.target.task
    ceilings = ceilings_of(plans.budget, task.model, task.example)
    best: tuple[float, nn.Module, Any, dict[str, Interval]] | None = None
    nearest: dict[str, Interval] = {}
    probes = 0

    def works(share: float) -> bool:
        nonlocal best, probes, nearest
        step(f"measuring {percent(share, 1)} of the {plans.cost}")
        small, plan = plans.plan_and_apply(share)
        probes += 1
        found = _readings(ceilings, small, target)
        nearest = min((nearest, found), key=lambda each: _excess(ceilings, each)) if nearest else found
        if _excess(ceilings, found) > 1:
            return False
        if best is None or share > best[0]:
            best = share, small, plan, found
        return True

    first = min(plans.most, *(ceiling.guess() for ceiling in ceilings))
    bisect(works, 0.0, plans.most, first, probes=PROBES)
    if best is None:
        raise _missed(ceilings, nearest, plans)
    share, small, plan, found = best
    met = {**_entries(ceilings, found), **plans.noted(share), "plans_measured": probes}
    return Met(*_noted(small, plan, plans.budget, met)), share


def _smallest(plans: Plans, held: Held, step: Step) -> Met:
    """The smallest model that is confirmed to be within the bounds on quality, if it is within the others."""
    budget, task = plans.budget, plans.target.task
    found = cheapest(plans, held.gauge, held.of, step)
    looks = found.looks
    at = next(k for k, point in enumerate(looks.points) if point.verdict == "chosen")
    ceilings = ceilings_of(budget, task.model, task.example)
    readings = _readings(ceilings, found.small, plans.target)
    if _excess(ceilings, readings) > 1:
        raise _missed(ceilings, readings, plans, f" with {' and '.join(budget.quality)} within bounds")
    met: dict[str, JsonValue] = {
        bound: {"value": damage.value, "at_most": looks.most[at][bound]}
        for bound, damage in looks.damages[at].items()
    }
    met |= {
        **_entries(ceilings, readings),
        **plans.noted(looks.points[at].share),
        "plans_measured": len(looks.points),
        "held_out_samples": held.gauge.samples,
    }
    small, plan = _noted(found.small, found.plan, budget, met)
    repaired = found.repaired
    attach(repaired, replace(record_of(repaired), plan=record_of(small).plan))
    return Met(small, plan, repaired, looks)


def _readings(ceilings: Iterable[Ceiling], small: nn.Module, target: Target) -> dict[str, Interval]:
    """What a model takes; of several processes, what the first one measured."""
    with joined(target.graph.device) as team:
        with team.together():
            found = {ceiling.name: ceiling(small) for ceiling in ceilings}
        return team.from_first(found)


def _excess(ceilings: Iterable[Ceiling], found: Mapping[str, Interval]) -> float:
    """By what factor the worst reading is over its limit; at most 1 if all are within."""
    return max((found[each.name].high / each.limit for each in ceilings), default=0.0)


def _entries(ceilings: Iterable[Ceiling], found: Mapping[str, Interval]) -> dict[str, JsonValue]:
    return {
        each.name: {
            "value": found[each.name].value, "low": found[each.name].low, "high": found[each.name].high,
            "shown": each.shown(found[each.name].value),
        }
        for each in ceilings
    }  # fmt: skip


def _missed(
    ceilings: Iterable[Ceiling], found: Mapping[str, Interval], plans: Plans, how: str = ""
) -> UnreachableBudgetError:
    worst = max(ceilings, key=lambda each: found[each.name].high / each.limit)
    reached = found[worst.name].high
    return UnreachableBudgetError(
        f"budget: expected at most {worst.shown(worst.limit)}, got {worst.shown(reached)} on this machine as "
        f"the least that was measured{how}. Ask for {worst.advice(reached)}.",
        smallest=reached,
    )


def _noted(small: nn.Module, plan: Any, budget: Budget, met: Mapping[str, Any]) -> tuple[nn.Module, Any]:
    """The plan with the whole budget and what was measured, also in the model's record."""
    settings = {**plan.settings, "met": dict(met)}
    if not isinstance(plan, Plan):
        return small, replace(plan, budget=budget.as_settings(), settings=settings)
    noted = plan.model_copy(update={"budget": budget.as_settings(), "settings": settings})
    attach(small, replace(record_of(small), plan=noted))
    return small, noted


def frontier_at(
    shares: Iterable[float],
    target: Target,
    rule: Any,
    scores: Scores,
    budget: Budget | None,
    met: Looks | None,
    held: Held,
) -> Frontier | None:
    """Measure the plans that keep these shares too, and return all that were measured; None if none was.

    Args:
        shares: Of the cost that plans vary. One that no plan reaches is left out.
        target: What is removed.
        rule: The allocator.
        scores: The scores that it reads.
        budget: Its confidence is that of intervals; None: 95 %.
        met: What was measured already.
        held: Measures.
    """
    plans = Plans(target, rule, scores, budget or target.budgets[0])
    looks = met or Looks(plans, held.gauge, (held.gauge.bound(),))
    with steps(None, target.task.progress) as step:
        for share in sorted(shares, reverse=True):
            step(f"frontier: {percent(share, 1)} of the {looks.plans.cost}")
            try:
                small, plan = looks.plans.plan_and_apply(share)
            except UnreachableBudgetError:
                continue
            looks.look(share, small, plan)
    return looks.frontier() if looks.points else None
