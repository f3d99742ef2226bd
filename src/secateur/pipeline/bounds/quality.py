"""Find the cheapest plan for which held-out data confirm that it damages the model no more than allowed.

Plans are measured from the largest to the smallest, in an order that is fixed before the held-out data are
read. The first plan that is not confirmed ends the search, and the plan before it is the result. The result
is wrong only if a plan that is out of bounds passes its test. The first such plan in the order must be one of
them, because the search ends where it fails. So each test may use the whole allowed error, however many tests
there are. Nothing assumes that smaller models are always worse. Sources: Maurer, Hothorn and Lehmacher 1995,
on testing hypotheses in a fixed order; Angelopoulos et al. 2021 (arXiv 2110.01052), on choosing models so.

The order has small steps near the expected result. That place is estimated before, by bisection on other data
with a quick repair.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from secateur.allocators import Budget
from secateur.calibration.subset import take_share
from secateur.common.formatting import percent
from secateur.common.progress import Step
from secateur.errors import BudgetError, SecateurError, UnreachableBudgetError
from secateur.measure.confidence import LEAST, samples_for, samples_needed
from secateur.measure.quality import Damage, Gauge
from secateur.pipeline.auto.choose import fixed
from secateur.pipeline.bounds.bisection import bisect
from secateur.pipeline.bounds.frontier import Frontier, Point
from secateur.pipeline.bounds.plans import Plans
from secateur.pipeline.result import clock
from secateur.signals.distributed import OF_THE_RUN, team_of_processes

ROUGH = 1000
"""The place of the result is estimated on about this many samples; the quick repair reads as many."""

PROBES = 6
"""Most plans that this estimate tries."""

STEP = 0.025
"""Near the estimate each plan is smaller than the one before by this fraction of the estimate."""

BEYOND = 6
"""Number of such steps above and below the estimate. Above these, each step is twice the one before; below
them, all steps are twice as large."""

FIRST = 0.95
"""The first share that is measured, if the other bounds allow it."""


@dataclass(eq=False)
class MeasuredPlans:
    """The plans that were repaired and measured on the held-out data, in the order of measurement.

    Attributes:
        plans: Makes the plans.
        gauge: Measures on the held-out data.
        bounds: The bounds on quality that are measured: fields of `Budget`.
        points: One point for each plan.
        damages: For each point the measured damage, by bound.
        most: For each point the upper confidence bound of the damage, by bound.
    """

    plans: Plans
    gauge: Gauge
    bounds: tuple[str, ...]
    points: list[Point] = field(default_factory=list)
    damages: list[dict[str, Damage]] = field(default_factory=list)
    most: list[dict[str, float]] = field(default_factory=list)

    def measure(self, share: float, small: nn.Module, plan: Any) -> nn.Module:
        """Repair and measure a model, add its point, and return the repaired model.

        Args:
            share: The share of the cost that the plan keeps.
            small: The pruned model.
            plan: Its plan.
        """
        target, budget = self.plans.target, self.plans.budget
        with clock(target.task.seconds, "repair"):
            repaired = target.repaired(small, plan)
        with clock(target.task.seconds, "measure"):
            found = {bound: self.gauge(repaired, bound) for bound in self.bounds}
        first = found[self.bounds[0]]
        low, high = first.interval(budget.confidence)
        macs, params = target.shares(plan)
        self.damages.append(found)
        self.most.append({bound: damage.bound(budget.confidence) for bound, damage in found.items()})
        self.points.append(
            Point(
                share=share, macs=macs, params=params, value=first.model, damage=first.value,
                low=low, high=high, most=self.most[-1][self.bounds[0]],
            )
        )  # fmt: skip
        return repaired

    def within(self) -> bool:
        """Whether the last plan is confirmed to be within all bounds."""
        budget = self.plans.budget
        return all(most <= getattr(budget, bound) for bound, most in self.most[-1].items())

    def set_verdict(self, verdict: str) -> None:
        """Set the verdict on the last plan."""
        self.points[-1] = self.points[-1].model_copy(update={"verdict": verdict})

    def frontier(self) -> Frontier:
        """All points as data for the report."""
        budget, bound = self.plans.budget, self.bounds[0]
        return Frontier(
            cost=self.plans.cost,
            bound=bound,
            measure=self.gauge.name(bound),
            dense=self.damages[0][bound].dense,
            samples=self.gauge.samples,
            confidence=budget.confidence,
            limit=getattr(budget, bound),
            points=tuple(sorted(self.points, key=lambda point: -point.share)),
        )


@dataclass(frozen=True, eq=False)
class Cheapest:
    """The result of the search.

    Attributes:
        small: The pruned model.
        plan: Its plan.
        repaired: The model after its repair. This is the model that was confirmed.
        tried: All plans that were measured.
    """

    small: nn.Module
    plan: Any
    repaired: nn.Module
    tried: MeasuredPlans


def require_enough(gauge: Gauge, budget: Budget, *, counted: bool) -> None:
    """Check that there are enough held-out samples to confirm the bounds in the best case.

    Args:
        gauge: Measures on the held-out samples.
        budget: The bounds.
        counted: Whether each sample is right or wrong. Then the bound is exact, also for few samples.

    Raises:
        BudgetError: There are too few samples.
    """
    for bound in budget.quality:
        limit, sure = getattr(budget, bound), f"{100 * budget.confidence:g} %"
        wanted = samples_needed(limit, budget.confidence) if counted and bound == "accuracy_drop" else LEAST
        if gauge.samples < wanted:
            raise BudgetError(
                f"budget: expected at least {wanted:,} held-out samples for {bound}={limit:g} at {sure}, got "
                f"{gauge.samples:,}: fewer cannot show that, even if none of them is worse for pruning. Pass "
                f"more data (half are held out), or held_out= with {wanted:,} samples, better several times "
                "as many."
            )


def estimated_share(plans: Plans, held: int, gauge_of: Any, step: Step) -> float:
    """Estimate the smallest share whose plan can be confirmed, by bisection without the held-out data.

    Args:
        plans: The plans.
        held: Number of held-out samples. The fewer there are, the further the damage must be below the bound.
        gauge_of: Makes a `Gauge` of other data.
        step: Shows what is done.
    """
    target, task, budget = plans.target, plans.target.task, plans.budget
    share = ROUGH / max(1, task.data.samples())
    whole = fixed(target)
    gauge = gauge_of(take_share(task.data.plain, share, whole=whole))
    few = take_share(task.fit, share, whole=whole)
    found = [plans.most]

    def works(share: float) -> bool:
        plan = plans.plan(share)
        step(f"estimating where to measure: {percent(share, 1)} of the {plans.cost}")
        try:
            small = target.candidate(plan, few)
            within = all(
                gauge(small, bound).expected(held, budget.confidence) <= getattr(budget, bound)
                for bound in budget.quality
            )
        except OF_THE_RUN:
            raise
        except SecateurError:  # a candidate that cannot run is taken for one that does not meet the bounds
            within = False
        with team_of_processes(target.graph.device) as team:
            within = team.from_first(within)
        if within:
            found.append(share)
        return within

    bisect(works, plans.most, 0.0, min(0.75, plans.most), probes=PROBES, gap=STEP)
    return min(found)


def shares_to_measure(place: float, most: float) -> Iterator[float]:
    """Yield the shares to measure, from the largest to the smallest.

    The first one is close to 1, so that there is something to confirm even if the estimate is far too low.

    Args:
        place: The estimate of the smallest share that can be confirmed.
        most: The largest share that the other bounds allow.

    Example:
        >>> [round(share, 2) for share, _ in zip(shares_to_measure(0.4, 1.0), range(9))]
        [0.95, 0.7, 0.58, 0.52, 0.46, 0.45, 0.44, 0.43, 0.42]
    """
    fine = STEP * place
    share, gap = place + BEYOND * fine, BEYOND * fine
    first, coarse = min(most, FIRST), []
    while share + gap < first - fine:
        coarse.append(share + gap)
        gap *= 2
    yield first
    yield from reversed(coarse)
    while share > 0:
        if share < first - 1e-9:
            yield share
        share -= fine if share > place - BEYOND * fine else 2 * fine


def cheapest(plans: Plans, gauge: Gauge, gauge_of: Any, step: Step) -> Cheapest:
    """Find the smallest model that is confirmed to be within all bounds on quality.

    Args:
        plans: The plans, with the budget.
        gauge: Measures on the held-out data, which nothing else has read.
        gauge_of: Makes a `Gauge` of other data, for the estimate.
        step: Shows what is done.

    Raises:
        UnreachableBudgetError: Not even the first plan, which keeps most, is confirmed. `smallest` is the
            upper confidence bound of its damage.
        BudgetError: By the user's metric the smallest possible model is no worse, or better.
    """
    target, budget = plans.target, plans.budget
    tried = MeasuredPlans(plans, gauge, budget.quality)
    best: Cheapest | None = None
    before: Any = None
    last = False
    estimate = estimated_share(plans, gauge.samples, gauge_of, step)
    for share in shares_to_measure(estimate, plans.most):
        try:
            small, plan = plans.plan_and_apply(share)
        except UnreachableBudgetError as error:
            share, last = error.smallest, True
            small, plan = plans.plan_and_apply(share)
        if before is None or not target.same(before, plan):
            step(f"{percent(share, 1)} of the {plans.cost}")
            repaired, before = tried.measure(share, small, plan), plan
            with team_of_processes(target.graph.device) as team:
                within = team.from_first(tried.within())
            tried.set_verdict("within" if within else "not confirmed")
            if not within:
                break
            best = Cheapest(small, plan, repaired, tried)
        if last:
            _check_metric(tried)
            break
    if best is None:
        raise _unconfirmed(tried)
    kept = max(k for k, point in enumerate(tried.points) if point.verdict == "within")
    tried.points[kept] = tried.points[kept].model_copy(update={"verdict": "chosen"})
    return best


def _check_metric(tried: MeasuredPlans) -> None:
    """Refuse a metric of the user's own by which the smallest possible model is no worse, or even better."""
    damage, bound = tried.damages[-1].get("accuracy_drop"), tried.most[-1].get("accuracy_drop", 0.0)
    if tried.gauge.has_metric and damage is not None and (bound < 0 or not damage.differences.any()):
        raise BudgetError(
            f"budget: expected a metric that falls when a model gets worse, got "
            f"{tried.gauge.name('accuracy_drop')}: it is {damage.dense:.4g} for the dense model and "
            f"{damage.model:.4g} for the smallest possible one ({percent(tried.points[-1].share, 1)} of the "
            f"{tried.plans.cost}). Higher must be better: return minus an error, or one minus it."
        )


def _unconfirmed(tried: MeasuredPlans) -> UnreachableBudgetError:
    budget, point, damages = tried.plans.budget, tried.points[-1], tried.damages[-1]
    sure = f"{100 * budget.confidence:g} %"
    name, most = next((b, most) for b, most in tried.most[-1].items() if most > getattr(budget, b))
    limit, damage = getattr(budget, name), damages[name]
    wanted = max(
        samples_for(d.differences, _unscaled(b, getattr(budget, b)), budget.confidence)
        for b, d in damages.items()
    )
    advice = (
        f"About {math.ceil(wanted / 100) * 100:,} held-out samples would show it. Pass more data."
        if wanted < math.inf
        else "Allow more, or repair better."
    )
    return UnreachableBudgetError(
        f"budget: expected a plan for which held-out data confirm {name} of at most {limit:.4g} ({sure}), "
        f"got none. The first plan keeps {percent(point.share, 1)} of the {tried.plans.cost}: measured "
        f"{damage.value:.4g}, at most {most:.4g}, on {tried.gauge.samples:,} samples. {advice}",
        smallest=most,
    )


def _unscaled(bound: str, limit: float) -> float:
    """Convert a limit to the scale of the samples' differences: for perplexity, that of the loss."""
    return math.log1p(limit) if bound == "perplexity_rise" else limit
