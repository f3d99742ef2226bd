"""What every rule shares: one knob, a budget that turns it, limits, and the plan that comes out.

A rule says how many units each group loses as its knob turns (`Allocator.steps`); everything else is here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from secateur.allocate.budget import Budget, solve
from secateur.allocate.limits import Limits
from secateur.allocate.signals import ScoreTable, table
from secateur.errors import BudgetError, SettingError
from secateur.plan import Plan
from secateur.score.scores import Scores

if TYPE_CHECKING:
    from secateur.cost import Cost
    from secateur.graph.graph import Graph


@dataclass(frozen=True, eq=False)
class Staircase:
    """How many units one group loses as the knob turns.

    Below ``knob[0]`` it loses none; from ``knob[j]`` on, the first ``count[j]`` units of `order`.

    Attributes:
        order: The units in the order in which they go. [group.size]
        knob: Values of the knob at which the count changes, strictly ascending. [stairs]
        count: Units gone from there on, never falling. [stairs]
    """

    order: NDArray[np.int64]
    knob: NDArray[np.float64]
    count: NDArray[np.int64]

    def removed(self, knob: float | None) -> int:
        """How many units are gone at this value of the knob; None: the knob is off, nothing goes."""
        stair = 0 if knob is None else int(np.searchsorted(self.knob, knob, side="right"))
        return int(self.count[stair - 1]) if stair else 0


class Allocator(ABC):
    """A rule that decides how many units each group loses.

    A rule has one knob: turning it up removes more, never less, from every group, and it has finitely
    many values that matter. Without a budget `knob` says where it stands; with one it is turned just far
    enough, which gives the largest reachable cost within the budget.

    To write a rule, derive from this class and fill in `name`, `signals`, `knob`, `settings` and `steps`.
    """

    name: ClassVar[str]

    @property
    @abstractmethod
    def signals(self) -> tuple[str, ...]:
        """The signals whose scores it needs."""

    @abstractmethod
    def knob(self, budget: Budget | None) -> float | None:
        """Where the knob stands when there is no budget to solve it from; not used if there is one.

        Raises:
            SettingError: What was set does not fit: no value and no budget, for example.
        """

    @abstractmethod
    def settings(self, knob: float | None) -> dict[str, JsonValue]:
        """The rule's settings, with the value of the knob that decided (None: nothing had to go)."""

    @abstractmethod
    def steps(self, graph: Graph, scores: ScoreTable, limits: Limits) -> Mapping[str, Staircase]:
        """How many units each group loses as the knob turns.

        Args:
            graph: The traced model.
            scores: Of at least the signals in `signals`.
            limits: ``limits.considered(graph.groups)`` are the groups to decide on;
                ``limits.feasible(size)`` the counts that are allowed. Counts between those are lowered
                to the next allowed one.

        Returns:
            Per group name its staircase; groups that are not named lose nothing.

        Raises:
            ScoreError: The scores do not fit.
        """

    def certificates(
        self, graph: Graph, scores: ScoreTable, limits: Limits, removed: Mapping[str, int], knob: float | None
    ) -> dict[str, JsonValue]:
        """What the rule can vouch for, given what each considered group loses; nothing by default."""
        return {}

    @final
    def allocate(
        self,
        graph: Graph,
        scores: Scores | ScoreTable,
        budget: Budget | None = None,
        limits: Limits | None = None,
        seed: int = 0,
    ) -> Plan:
        """Decides how many units of each group go, and which.

        Args:
            graph: The traced model.
            scores: What `sc.score` gave, or a mapping: per signal and group one finite value per unit
                [group.size], higher is worth more.
            budget: What the pruned model may cost; None leaves the decision to the rule's own setting.
            limits: What the rule may not overstep; None for the defaults.
            seed: Recorded in the plan.

        Returns:
            The plan. Under a budget its cost is the largest within the budget that the rule's knob reaches.

        Raises:
            ScoreError: A signal is missing, or its scores do not fit the groups or are of another model.
            SettingError: The rule has no value for its knob, or an ignore pattern matches nothing.
            NothingToPruneError: No group is left to decide on.
            UnreachableBudgetError: No value of the knob meets the budget.
        """
        if budget is not None and not isinstance(budget, Budget):
            raise BudgetError(
                f"allocate: expected budget to be a Budget or None, got {budget!r}. "
                "Write Budget(macs=0.5), for example."
            )
        if limits is None:
            limits = Limits()
        elif not isinstance(limits, Limits):
            raise SettingError(
                f"allocate: expected limits to be Limits or None, got {limits!r}. "
                "Write Limits(round_to=8), for example."
            )
        sizes = {group.name: group.size for group in limits.considered(graph.groups)}
        values = table(scores, graph)
        knob = self.knob(budget)
        steps = self.steps(graph, values, limits)
        steps = {name: steps[name] for name in sizes if name in steps}
        if budget is not None:
            knob = _turn(graph, budget, limits, steps, sizes)
        removed = _removed(limits, steps, sizes, knob)
        return Plan.build(
            graph,
            _keep(steps, removed),
            allocator=self.name,
            settings=self.settings(knob) | {"limits": limits.as_settings()},
            seed=seed,
            budget=None if budget is None else budget.as_settings(),
            certificates=self.certificates(graph, values, limits, removed, knob),
        )


def _turn(
    graph: Graph, budget: Budget, limits: Limits, steps: Mapping[str, Staircase], sizes: Mapping[str, int]
) -> float | None:
    """The value of the knob that just meets the budget; None if the dense model does."""
    dense = graph.cost()
    values = np.unique(np.concatenate([stairs.knob for stairs in steps.values()] or [np.empty(0)]))

    def value(step: int) -> float | None:
        return float(values[step - 1]) if step else None

    def cost_at(step: int) -> Cost:
        return graph.cost(_keep(steps, _removed(limits, steps, sizes, value(step)))) if step else dense

    return value(solve(budget, dense, len(values) + 1, cost_at))


def _removed(
    limits: Limits, steps: Mapping[str, Staircase], sizes: Mapping[str, int], knob: float | None
) -> dict[str, int]:
    """Per group the number of units that go at this value of the knob."""
    return {
        name: limits.removable(size, steps[name].removed(knob)) if name in steps else 0
        for name, size in sizes.items()
    }


def _keep(steps: Mapping[str, Staircase], removed: Mapping[str, int]) -> dict[str, NDArray[np.bool_]]:
    masks: dict[str, NDArray[np.bool_]] = {}
    for name, stairs in steps.items():
        masks[name] = np.ones(len(stairs.order), dtype=np.bool_)
        masks[name][stairs.order[: removed[name]]] = False
    return masks
