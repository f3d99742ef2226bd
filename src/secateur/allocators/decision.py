"""Find the value of an allocator's knob that meets a budget, then put units back while the budget holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from secateur.allocators.budget import Budget, solve
from secateur.allocators.limits import Limits
from secateur.allocators.step_function import StepFunction, masks

if TYPE_CHECKING:
    from secateur.graph.graph import Graph
    from secateur.measure.cost import Cost


@dataclass(frozen=True, eq=False)
class Decision:
    """How many units each group loses, and how this was decided.

    Attributes:
        knob: Value of the knob; None: nothing is removed.
        budget: The budget that the knob was solved for; None if the allocator's own setting decided.
        steps: Step function of each considered group.
        turned: Number of units that the knob alone removes from each considered group.
        removed: Number of units that are removed in the end from each considered group: `turned`, or fewer if
            units were put back to spend the budget. They are the first units in the group's removal order.
    """

    knob: float | None
    budget: Budget | None
    steps: Mapping[str, StepFunction]
    turned: Mapping[str, int]
    removed: Mapping[str, int]

    @property
    def keep(self) -> dict[str, NDArray[np.bool_]]:
        """Mask of each considered group, True for units that stay. [group.size]"""
        return masks(self.steps, self.removed)


def decide(
    graph: Graph, budget: Budget | None, limits: Limits, steps: Mapping[str, StepFunction], knob: float | None
) -> Decision:
    """Decide how many units each group loses.

    Args:
        graph: The traced model.
        budget: With a budget, the smallest value of the knob that meets it is used. None: `knob` is used.
        limits: Bounds on what may be removed.
        steps: Step function of each considered group.
        knob: Value of the knob without a budget.

    Raises:
        UnreachableBudgetError: No value of the knob meets the budget.
    """
    if budget is not None:
        knob = _turn(graph, budget, limits, steps)
    turned = _removed(limits, steps, knob)
    removed = _spend(graph, budget, limits, steps, turned) if budget is not None and budget.spend else turned
    return Decision(knob, budget, steps, turned, removed)


def _turn(graph: Graph, budget: Budget, limits: Limits, steps: Mapping[str, StepFunction]) -> float | None:
    """The smallest value of the knob that meets the budget; None if the dense model meets it."""
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
    """Put units back while the budget holds, in the reverse order of their removal.

    One value of the knob can remove units from several groups. These are put back evenly: the group that
    still misses the largest share of its units of this value is next, and the earlier group if shares are
    equal. So the allocator's proportions are kept, also if one value removes many units, as a tolerance of 0
    does.

    If a unit does not fit into the budget, its group gets no more units back. It would not fit later either,
    because a unit costs more when other groups keep more. In the end, no group can get its next unit back.

    Returns:
        Number of units that stay removed, by group.
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
    """Number of units removed from each group at a value of the knob, within the limits."""
    return {
        name: limits.removable(len(function.order), function.removed(knob))
        for name, function in steps.items()
    }
