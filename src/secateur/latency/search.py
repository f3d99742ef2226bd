"""The search for a plan that is fast enough, by measurement."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from secateur.errors import UnreachableBudgetError
from secateur.latency.interval import Interval

T = TypeVar("T")
PROBES = 7
"""Plans that are measured at most; each halves what is left of the range of MACs."""


@dataclass(frozen=True)
class Found(Generic[T]):
    """What the search settled on.

    Attributes:
        what: The plan that was measured, with what came with it.
        macs: The share of the dense MACs that it was asked for.
        share: Its latency over the dense one's. The upper end is within the target.
        probes: How many plans were measured.
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
    """The plan with the most MACs, of those measured, whose latency is surely within the target.

    Bisection in the share of MACs, which turns any rule's knob. Latency follows MACs only roughly, and no
    curve gives it, so a plan counts as fast enough when the whole interval of its measured share is.

    Args:
        target: The share of the dense latency, in (0, 1).
        plan_at: The rule's plan at a share of the dense MACs; raises UnreachableBudgetError with the
            smallest share below that.
        measure: A plan's latency over the dense one's.
        most: The largest share of MACs that other budgets leave.
        probes: Plans to measure at most.

    Raises:
        UnreachableBudgetError: No plan that was measured is fast enough; `smallest` is the least share of
            the latency that was measured.
    """
    slow, quick = most, 0.0
    best: Found[T] | None = None
    least: Interval | None = None
    asked = min(target, most)
    for probe in range(1, probes + 1):
        try:
            found = plan_at(asked)
        except UnreachableBudgetError as error:
            if error.smallest >= slow:  # nothing lies between what is too slow and what cannot be
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
