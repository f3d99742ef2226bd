"""Search for a plan that is fast enough, by timing pruned models."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from secateur.errors import UnreachableBudgetError
from secateur.measure.latency.interval import Interval

T = TypeVar("T")
PROBES = 7
"""Most plans that are timed. Each one halves the range of MACs that is left."""


@dataclass(frozen=True)
class Found(Generic[T]):
    """The result of the search.

    Attributes:
        what: What `plan_at` returned: the plan.
        macs: The budget of that plan, as a share of the dense MACs.
        share: Its latency divided by the dense latency. The upper end is at most the target.
        probes: The number of plans that had been timed when this one was found.
    """

    what: T
    macs: float
    share: Interval
    probes: int


def fast_enough(
    target: float,
    plan_at: Callable[[float], T],
    measure: Callable[[T], Interval],
    *,
    most: float = 1.0,
    probes: int = PROBES,
) -> Found[T]:
    """Return the timed plan with the most MACs whose latency is within the target.

    This is a bisection over the share of MACs, which every rule accepts as a budget. Latency follows MACs
    only roughly, so each plan is timed. A plan is fast enough if the upper end of its interval is at most
    the target.

    Args:
        target: The wanted latency as a share of the dense latency, in (0, 1).
        plan_at: Returns the rule's plan for a share of the dense MACs. Raises UnreachableBudgetError if
            the share is too small, with the smallest reachable share.
        measure: Returns a plan's latency divided by the dense latency.
        most: The largest share of MACs that the other budgets allow.
        probes: Most plans to time.

    Raises:
        UnreachableBudgetError: If no timed plan is fast enough. `smallest` is the smallest share of
            the dense latency that was measured (upper end).
    """
    slow, quick = most, 0.0
    best: Found[T] | None = None
    least: Interval | None = None
    asked = min(target, most)
    for probe in range(1, probes + 1):
        try:
            found = plan_at(asked)
        except UnreachableBudgetError as error:
            if error.smallest >= slow:  # every reachable share is known to be too slow
                break
            asked = quick = error.smallest
            found = plan_at(asked)
        share = measure(found)
        least = share if least is None or share.value < least.value else least
        if share.high <= target:
            best = Found(found, asked, share, probe) if best is None or asked > best.macs else best
            quick = max(quick, asked)
        else:
            slow = asked
        if slow <= quick or slow - quick < 0.005:
            break
        asked = (slow + quick) / 2
    if best is None:
        reached = most if least is None else least.high
        advice = math.ceil(reached * 100) / 100
        raise UnreachableBudgetError(
            f"budget: expected at most {target:.1%} of the dense latency, got {reached:.1%} on this machine "
            f"as the least that was measured. Ask for latency={advice:.2f}, give larger batches, or bound "
            f"MACs instead.",
            smallest=reached,
        )
    return best
