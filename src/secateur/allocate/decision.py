"""Turning a rule's knob until the budget is met, and spending what is left of the budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from secateur.allocate.budget import Budget, solve
from secateur.allocate.limits import Limits
from secateur.allocate.step_function import StepFunction, masks

if TYPE_CHECKING:
    from secateur.cost import Cost
    from secateur.graph.graph import Graph


@dataclass(frozen=True, eq=False)
class Decision:
    """How many units each group loses, and how that was found.

    Attributes:
        knob: Where the knob stands; None: it is off, nothing goes.
        budget: What the knob was solved for; None if the rule's own setting decided.
        steps: Per considered group its step function.
        turned: Per considered group, how many units the knob takes.
        removed: Per considered group, how many units go: those, or fewer where the budget is spent to
            the last unit. The first so many of the group's order.
    """

    knob: float | None
    budget: Budget | None
    steps: Mapping[str, StepFunction]
    turned: Mapping[str, int]
    removed: Mapping[str, int]

    @property
    def keep(self) -> dict[str, NDArray[np.bool_]]:
        """Per considered group, True for each unit that stays. [group.size]"""
        return masks(self.steps, self.removed)


def decide(
    graph: Graph, budget: Budget | None, limits: Limits, steps: Mapping[str, StepFunction], knob: float | None
) -> Decision:
    """Turns the knob just far enough for the budget; without a budget it stays at `knob`.

    Raises:
        UnreachableBudgetError: No value of the knob meets the budget.
    """
    if budget is not None:
        knob = _turn(graph, budget, limits, steps)
    turned = _removed(limits, steps, knob)
    removed = _spend(graph, budget, limits, steps, turned) if budget is not None and budget.spend else turned
    return Decision(knob, budget, steps, turned, removed)


def _turn(graph: Graph, budget: Budget, limits: Limits, steps: Mapping[str, StepFunction]) -> float | None:
    """The value of the knob that just meets the budget; None if the dense model does."""
    dense = graph.cost()
    values = np.unique(np.concatenate([function.knob for function in steps.values()] or [np.empty(0)]))

    def value(step: int) -> float | None:
        return float(values[step - 1]) if step else None

    def cost_at(step: int) -> Cost:
        return graph.cost(masks(steps, _removed(limits, steps, value(step)))) if step else dense

    return value(solve(budget, dense, len(values) + 1, cost_at))


def _spend(
    graph: Graph, budget: Budget, limits: Limits, steps: Mapping[str, StepFunction], turned: Mapping[str, int]
) -> dict[str, int]:
    """Gives units back, in the reverse of the order in which the knob took them, while the budget holds.

    Units that went at one value of the knob come back evenly: all groups lose the same share of what that
    value took from each; of equal ones the earlier group is first. So the proportions that the rule chose
    stay, which matters where one value takes much, as a tolerance of 0 does. A unit that does not fit ends
    the giving back for its group only: later it would fit still less, since what a unit costs grows with
    what the others keep. So in the end no group can get its next unit back.
    """
    dense = graph.cost()
    removed = dict(turned)
    open_groups = [name for name, count in removed.items() if count]

    while open_groups:
        name = max(open_groups, key=lambda name: steps[name].went(removed[name]))
        fewer = limits.removable(len(steps[name].order), removed[name] - 1)
        fits = budget.met(graph.cost(masks(steps, removed | {name: fewer})), dense)
        if fits:
            removed[name] = fewer
        if not fits or not fewer:
            open_groups.remove(name)
    return removed


def _removed(limits: Limits, steps: Mapping[str, StepFunction], knob: float | None) -> dict[str, int]:
    """Per group the number of units that go at this value of the knob."""
    return {
        name: limits.removable(len(function.order), function.removed(knob))
        for name, function in steps.items()
    }
