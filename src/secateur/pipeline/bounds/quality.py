"""Find the cheapest plan of which held-out data show that it damages the model no more than allowed.

Plans are looked at from the largest to the smallest, in an order that was fixed before these data were read;
the first one that cannot be confirmed ends the search, and the one before is the result. For a wrong result
a plan that is out of bounds must pass its test, and the first such plan in the order is the only one that can
start it. So each look may use the whole error that is allowed, however many looks there are. Source: Maurer,
Hothorn and Lehmacher 1995, on testing hypotheses in an order fixed beforehand; Angelopoulos et al. 2021
(arXiv 2110.01052), the same for choosing among models. That needs no assumption that less is always worse.

Where the order has its small steps is found before, by bisection with other data and a quick repair.
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
from secateur.signals.distributed import OF_THE_RUN, joined

ROUGH = 1000
"""About so many samples tell where to look; a quick repair reads as many."""

PROBES = 6
"""Most plans that are tried for that."""

STEP = 0.025
"""Near that place each plan is this much smaller than the one before, as a fraction of the place."""

BEYOND = 6
"""So many such steps above and below the place; above those, steps double, below they are twice as large."""

FIRST = 0.95
"""The share that is looked at first, if the other bounds allow it."""


@dataclass(eq=False)
class Looks:
    """Plans that were repaired and measured on the held-out data.

    Attributes:
        plans: The plans.
        gauge: Measures on the held-out data.
        bounds: What is measured: fields of `Budget`.
        points: What was found, in this order.
        damages: For each point, what was measured by bound.
        most: For each point, what the damage is at most, by bound.
    """

    plans: Plans
    gauge: Gauge
    bounds: tuple[str, ...]
    points: list[Point] = field(default_factory=list)
    damages: list[dict[str, Damage]] = field(default_factory=list)
    most: list[dict[str, float]] = field(default_factory=list)

    def look(self, share: float, small: nn.Module, plan: Any) -> nn.Module:
        """Repair and measure; return the repaired model.

        Args:
            share: What the plan was asked to keep.
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
        """Whether the last one is confirmed to be within all bounds."""
        budget = self.plans.budget
        return all(most <= getattr(budget, bound) for bound, most in self.most[-1].items())

    def judged(self, verdict: str) -> None:
        """Note what became of the last one."""
        self.points[-1] = self.points[-1].model_copy(update={"verdict": verdict})

    def frontier(self) -> Frontier:
        """What was found, as the report holds it."""
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
        repaired: The model after its repair, which is what was confirmed.
        looks: All that were looked at.
    """

    small: nn.Module
    plan: Any
    repaired: nn.Module
    looks: Looks


def require_enough(gauge: Gauge, budget: Budget, *, counted: bool) -> None:
    """Refuse a bound that so few samples cannot confirm, whatever they show.

    Args:
        gauge: What measures.
        budget: The bounds.
        counted: Whether samples are right or wrong, so that few of them can show it exactly.

    Raises:
        BudgetError: There are too few.
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


def roughly(plans: Plans, held: int, gauge_of: Any, step: Step) -> float:
    """Return about the smallest share whose plan can be confirmed, by bisection without held-out data.

    Args:
        plans: The plans.
        held: How many samples will be held out: with fewer, the damage must be further below the bound.
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
        step(f"looking for the place: {percent(share, 1)} of the {plans.cost}")
        try:
            small = target.candidate(plan, few)
            within = all(
                gauge(small, bound).expected(held, budget.confidence) <= getattr(budget, bound)
                for bound in budget.quality
            )
        except OF_THE_RUN:
            raise
        except SecateurError:  # a candidate that cannot run says nothing about the place
            within = False
        with joined(target.graph.device) as team:
            within = team.from_first(within)
        if within:
            found.append(share)
        return within

    bisect(works, plans.most, 0.0, min(0.75, plans.most), probes=PROBES, gap=STEP)
    return min(found)


def order(place: float, most: float) -> Iterator[float]:
    """Yield the shares to look at, from the largest to the smallest.

    The first one is safe, so that a place that is far too low still leaves something to confirm.

    Example:
        >>> [round(share, 2) for share, _ in zip(order(0.4, 1.0), range(9))]
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
        gauge_of: Makes a `Gauge` of other data, to find where to look.
        step: Shows what is done.

    Raises:
        UnreachableBudgetError: Not even the first plan, which keeps most, is confirmed. `smallest` is the
            damage that is confirmed for it.
    """
    target, budget = plans.target, plans.budget
    looks = Looks(plans, gauge, budget.quality)
    best: Cheapest | None = None
    before: Any = None
    last = False
    for asked in order(roughly(plans, gauge.samples, gauge_of, step), plans.most):
        share = asked
        try:
            small, plan = plans.plan_and_apply(share)
        except UnreachableBudgetError as error:
            share, last = error.smallest, True
            small, plan = plans.plan_and_apply(share)
        if before is None or not target.same(before, plan):
            step(f"{percent(share, 1)} of the {plans.cost}")
            repaired, before = looks.look(share, small, plan), plan
            with joined(target.graph.device) as team:
                within = team.from_first(looks.within())
            looks.judged("within" if within else "not confirmed")
            if not within:
                break
            best = Cheapest(small, plan, repaired, looks)
        if last:
            break
    if best is None:
        raise _unconfirmed(looks)
    kept = max(k for k, point in enumerate(looks.points) if point.verdict == "within")
    looks.points[kept] = looks.points[kept].model_copy(update={"verdict": "chosen"})
    return best


def _unconfirmed(looks: Looks) -> UnreachableBudgetError:
    budget, point, damages = looks.plans.budget, looks.points[-1], looks.damages[-1]
    sure = f"{100 * budget.confidence:g} %"
    name, most = next((b, most) for b, most in looks.most[-1].items() if most > getattr(budget, b))
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
        f"budget: expected a plan of which held-out data show {name} of at most {limit:.4g} ({sure}), got "
        f"none. The first one keeps {percent(point.share, 1)} of the {looks.plans.cost}: measured "
        f"{damage.value:.4g}, at most {most:.4g}, on {looks.gauge.samples:,} samples. {advice}",
        smallest=most,
    )


def _unscaled(bound: str, limit: float) -> float:
    """A limit in the terms of the differences of samples."""
    return math.log1p(limit) if bound == "perplexity_rise" else limit
