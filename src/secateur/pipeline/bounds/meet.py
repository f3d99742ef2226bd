"""Meet all bounds of a budget: by counting alone, or by measuring pruned models."""

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
from secateur.pipeline.bounds.frontier import Frontier
from secateur.pipeline.bounds.measured_bounds import MeasuredBound, measured_bounds_of
from secateur.pipeline.bounds.plans import COUNTED, Plans
from secateur.pipeline.bounds.quality import MeasuredPlans, cheapest, estimated_share
from secateur.pipeline.targets.target import Scored, Target
from secateur.plan import Plan
from secateur.signals import Scores
from secateur.signals.distributed import OF_THE_RUN, team_of_processes
from secateur.signals.units.combination import name_of
from secateur.targets.units.record import attach, record_of

PROBES = 8
"""Most plans that are measured for bounds on time and memory. Each one halves the range of shares."""


@dataclass(frozen=True, eq=False)
class PrunedWithinBudget:
    """A pruned model that is within the budget.

    Attributes:
        small: The pruned model.
        plan: Its plan. ``settings["met"]`` holds what was measured.
        repaired: The model after its repair; None if no bound needed a repaired model.
        tried: The plans that were measured on held-out data; None if there is no bound on quality.
    """

    small: nn.Module
    plan: Any
    repaired: nn.Module | None = None
    tried: MeasuredPlans | None = None


@dataclass(frozen=True, eq=False)
class HeldOut:
    """How quality is measured to meet a bound on it.

    Attributes:
        gauge: Measures on the held-out data, which nothing else reads.
        gauge_of: Makes a `Gauge` of other data.
    """

    gauge: Gauge
    gauge_of: Callable[[Calibration], Gauge]


def meet(
    target: Target, rule: Any, scores: Scores, budget: Budget | None, held: HeldOut | None = None
) -> PrunedWithinBudget:
    """Plan and prune within all bounds of a budget.

    Without measured bounds the result is the rule's plan. With bounds on latency or memory it is the largest
    model within them. With bounds on quality it is the smallest model that is confirmed to be within them.

    Args:
        target: What is removed.
        rule: The allocator, with the curves it measured.
        scores: The scores that it reads.
        budget: All bounds.
        held: Measures quality; needed if the budget bounds it.

    Raises:
        UnreachableBudgetError: No measured plan is within all bounds.
        BudgetError: There are bounds on quality, but `held` is None.
    """
    if budget is None or not budget.measured:
        return PrunedWithinBudget(*target.plan_and_apply(rule, scores, budget))
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
    target: Target, budget: Budget, known: Scored, rules: Iterable[Any], held: HeldOut | None
) -> Budget:
    """Return the budget for all candidates, with counted bounds only, so that they can be compared.

    A budget without measured bounds is returned unchanged. Otherwise the first rule that can run meets the
    measured bounds, and all candidates get the cost that its plan has.
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
                    return plans.counted(estimated_share(plans, held.gauge.samples, held.gauge_of, step))
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
    """Raise UnreachableBudgetError if no plan meets the counted bounds, before anything is measured."""
    if any(getattr(plans.budget, name) is not None for name in COUNTED):
        plans.plan(plans.most)


def _largest(plans: Plans, step: Step) -> tuple[PrunedWithinBudget, float]:
    """Find the largest model within the bounds on time and memory. Return it and the share it keeps."""
    target, task = plans.target, plans.target.task
    bounds = measured_bounds_of(plans.budget, task.model, task.example)
    best: tuple[float, nn.Module, Any, dict[str, Interval]] | None = None
    nearest: dict[str, Interval] = {}
    probes = 0

    def works(share: float) -> bool:
        nonlocal best, probes, nearest
        step(f"measuring {percent(share, 1)} of the {plans.cost}")
        small, plan = plans.plan_and_apply(share)
        probes += 1
        found = _measured(bounds, small, target)
        nearest = min((nearest, found), key=lambda each: _excess(bounds, each)) if nearest else found
        if _excess(bounds, found) > 1:
            return False
        if best is None or share > best[0]:
            best = share, small, plan, found
        return True

    first = min(plans.most, *(bound.guess() for bound in bounds))
    bisect(works, 0.0, plans.most, first, probes=PROBES)
    if best is None:
        raise _unreachable(bounds, nearest, plans)
    share, small, plan, found = best
    met = {**_record_entries(bounds, found), **plans.bound_for(share), "plans_measured": probes}
    return PrunedWithinBudget(*_recorded(small, plan, plans.budget, met)), share


def _smallest(plans: Plans, held: HeldOut, step: Step) -> PrunedWithinBudget:
    """Find the smallest model that is confirmed to be within the bounds on quality, and check the others."""
    budget, task = plans.budget, plans.target.task
    found = cheapest(plans, held.gauge, held.gauge_of, step)
    tried = found.tried
    at = next(k for k, point in enumerate(tried.points) if point.verdict == "chosen")
    bounds = measured_bounds_of(budget, task.model, task.example)
    values = _measured(bounds, found.small, plans.target)
    if _excess(bounds, values) > 1:
        raise _unreachable(bounds, values, plans, f" with {' and '.join(budget.quality)} within bounds")
    met: dict[str, JsonValue] = {
        bound: {"value": damage.value, "at_most": tried.most[at][bound]}
        for bound, damage in tried.damages[at].items()
    }
    met |= {
        **_record_entries(bounds, values),
        **plans.bound_for(tried.points[at].share),
        "plans_measured": len(tried.points),
        "held_out_samples": held.gauge.samples,
    }
    small, plan = _recorded(found.small, found.plan, budget, met)
    repaired = found.repaired
    attach(repaired, replace(record_of(repaired), plan=record_of(small).plan))
    return PrunedWithinBudget(small, plan, repaired, tried)


def _measured(bounds: Iterable[MeasuredBound], small: nn.Module, target: Target) -> dict[str, Interval]:
    """Measure a model for each bound. All processes get what the first one measured."""
    with team_of_processes(target.graph.device) as team:
        with team.together():
            found = {bound.name: bound(small) for bound in bounds}
        return team.from_first(found)


def _excess(bounds: Iterable[MeasuredBound], found: Mapping[str, Interval]) -> float:
    """Return the largest measured value divided by its limit; at most 1 if all bounds are met."""
    return max((found[each.name].high / each.limit for each in bounds), default=0.0)


def _record_entries(bounds: Iterable[MeasuredBound], found: Mapping[str, Interval]) -> dict[str, JsonValue]:
    return {
        each.name: {
            "value": found[each.name].value, "low": found[each.name].low, "high": found[each.name].high,
            "shown": each.shown(found[each.name].value),
        }
        for each in bounds
    }  # fmt: skip


def _unreachable(
    bounds: Iterable[MeasuredBound], found: Mapping[str, Interval], plans: Plans, how: str = ""
) -> UnreachableBudgetError:
    worst = max(bounds, key=lambda each: found[each.name].high / each.limit)
    reached = found[worst.name].high
    return UnreachableBudgetError(
        f"budget: expected at most {worst.shown(worst.limit)}, got {worst.shown(reached)} on this machine as "
        f"the smallest measured value{how}. Ask for {worst.advice(reached)}.",
        smallest=reached,
    )


def _recorded(small: nn.Module, plan: Any, budget: Budget, met: Mapping[str, Any]) -> tuple[nn.Module, Any]:
    """Write the whole budget and the measured values into the plan and into the model's record."""
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
    met: MeasuredPlans | None,
    held: HeldOut,
) -> Frontier | None:
    """Also measure the plans that keep these shares. Return all measured plans; None if there are none.

    Args:
        shares: Shares of the cost to keep. A share that no plan reaches is left out.
        target: What is removed.
        rule: The allocator.
        scores: The scores that it reads.
        budget: The budget, with the confidence of the intervals; None: 95 %.
        met: The plans that were measured before; None if there are none.
        held: Measures quality.
    """
    plans = Plans(target, rule, scores, budget or target.budgets[0])
    tried = met or MeasuredPlans(plans, held.gauge, (held.gauge.bound(),))
    with steps(None, target.task.progress) as step:
        for share in sorted(shares, reverse=True):
            step(f"frontier: {percent(share, 1)} of the {tried.plans.cost}")
            try:
                small, plan = tried.plans.plan_and_apply(share)
            except UnreachableBudgetError:
                continue
            tried.measure(share, small, plan)
    return tried.frontier() if tried.points else None
