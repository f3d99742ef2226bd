"""What every rule shares: one knob, a budget that turns it, limits, and the plan that comes out.

A rule says how many units each group loses as its knob turns (`Allocator.steps`); the rest follows from that.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, cast, final

import numpy as np
from pydantic import JsonValue
from torch import nn

from secateur.allocate.budget import Budget
from secateur.allocate.curve import Curve, curve
from secateur.allocate.decision import Decision, decide
from secateur.allocate.description import Certificate, Description, listed
from secateur.allocate.limits import Limits
from secateur.allocate.signals import ScoreTable, table
from secateur.allocate.step_function import StepFunction
from secateur.errors import BudgetError, SettingError
from secateur.plan import Plan
from secateur.score.combination import Asked
from secateur.score.scores import Scores

if TYPE_CHECKING:
    from secateur.experts.graph import ExpertGraph
    from secateur.graph.graph import Graph


class Allocator(ABC):
    """A rule that decides how many units each group loses.

    A rule has one knob: turning it up removes more, never less, from every group, and it has finitely
    many values that matter. Without a budget `knob` says where it stands; with one it is turned just far
    enough, which gives the largest reachable cost within the budget. `curve` is what all values give.

    To write a rule, derive from this class and fill in `name`, `signals`, `knob`, `settings` and `steps`.
    What reports say of a rule comes from the rule itself: `solved`, `knob_name` and `certificate`.

    Attributes:
        name: What users call it.
        solved: The entry of `settings` that a budget solves for; empty if there is none.
        knob_name: What the knob is called on the axis of a plot; empty: what `solved` says.
        on_weights: Whether the rule can decide on single weights.
        spends: Whether units may come back one by one while a budget holds.
    """

    name: ClassVar[str]
    solved: ClassVar[str] = ""
    knob_name: ClassVar[str] = ""
    on_weights: ClassVar[bool] = True
    spends: ClassVar[bool] = True

    @property
    @abstractmethod
    def signals(self) -> tuple[Asked, ...]:
        """The signals whose scores it needs: names, instances or combinations."""

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
    def steps(self, graph: Graph, scores: ScoreTable, limits: Limits) -> Mapping[str, StepFunction]:
        """How many units each group loses as the knob turns.

        Args:
            graph: The traced model.
            scores: Of at least the signals in `signals`.
            limits: ``limits.considered(graph.groups)`` are the groups to decide on;
                ``limits.feasible(size)`` the counts that are allowed. Counts between those are lowered
                to the next allowed one.

        Returns:
            Per group name its step function; groups that are not named lose nothing.

        Raises:
            ScoreError: The scores do not fit.
        """

    def certificates(
        self, graph: Graph, scores: ScoreTable, limits: Limits, decision: Decision
    ) -> dict[str, JsonValue]:
        """What the rule guarantees or predicts, given what each group loses; nothing by default."""
        return {}

    def certificate(self, found: Mapping[str, Any]) -> Certificate:
        """The sentences and the table that say what `certificates` found.

        Args:
            found: What `certificates` returned, or what a file of an older version holds in its place.
        """
        return listed(found)

    def describe(self, certificates: Mapping[str, Any]) -> Description:
        """What a report shows of this rule and of what it certified."""
        return Description(
            setting=self.solved,
            knob=self.knob_name or self.solved or "knob",
            certificate=self.certificate(certificates) if certificates else None,
        )

    @final
    def allocate(
        self,
        graph: Graph | ExpertGraph,
        scores: Scores | ScoreTable,
        budget: Budget | None = None,
        limits: Limits | None = None,
        seed: int = 0,
    ) -> Plan:
        """Decides how many units of each group go, and which.

        Where units are experts, the groups are their blocks. No block keeps fewer experts than a token uses.
        A router that parts its experts into groups of its own loses equally many of each: the first to go
        by the rule's order within it.

        Args:
            graph: The traced model.
            scores: What `sc.score` gave, or a mapping: per signal and group one finite value per unit
                [group.size], higher is worth more.
            budget: What the pruned model may cost; None leaves the decision to the rule's own setting.
            limits: What the rule may not overstep; None for the defaults.
            seed: Recorded in the plan.

        Returns:
            The plan. Under a budget the rule's knob stands at the largest cost within the budget that it
            reaches; unless ``Budget(spend=False)`` says so, units that it took then come back one by one
            while the budget holds.

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
        graph = cast("Graph", graph)  # rules read groups and costs, which one of experts has too
        rule, limits = graph.adapted(self, _checked(limits, graph))
        if budget is not None and not rule.spends:
            budget = replace(budget, spend=False)
        values = table(scores, graph, rule.signals)
        decision = rule.decide(graph, values, budget, limits)
        plan = Plan.build(
            graph,
            decision.keep,
            allocator=rule.name,
            settings=rule.settings(decision.knob) | {"limits": limits.as_settings()},
            seed=seed,
            budget=None if budget is None else budget.as_settings(),
            certificates=rule.certificates(graph, values, limits, decision),
        )
        return plan.on(rule._curve(graph, limits, decision.steps))

    @final
    def curve(
        self, graph: Graph | ExpertGraph, scores: Scores | ScoreTable, limits: Limits | None = None
    ) -> Curve:
        """What every value of the knob would give: MACs, parameters and units kept, all values at once.

        Where the knob stands plays no part: ``ToD().curve(graph, scores)`` is the curve of all tolerances.

        Args:
            graph: The traced model.
            scores: As for `allocate`.
            limits: As for `allocate`.

        Returns:
            The curve, exact at every point.

        Raises:
            ScoreError: A signal is missing, or its scores do not fit the groups or are of another model.
            SettingError: An ignore pattern matches nothing.
            NothingToPruneError: No group is left to decide on.
        """
        graph = cast("Graph", graph)
        rule, limits = graph.adapted(self, _checked(limits, graph))
        values = table(scores, graph, rule.signals)
        return rule._curve(graph, limits, rule._considered(graph, values, limits))

    @final
    def decide(self, graph: Graph, scores: ScoreTable, budget: Budget | None, limits: Limits) -> Decision:
        """What `allocate` writes into a plan: how many units of each considered group go."""
        knob = self.knob(budget)
        return decide(graph, budget, limits, self._considered(graph, scores, limits), knob)

    def _curve(self, graph: Graph, limits: Limits, steps: Mapping[str, StepFunction]) -> Curve:
        knob_name = self.describe({}).knob
        return curve(self.name, graph, limits, steps, knob_name)

    def _considered(self, graph: Graph, scores: ScoreTable, limits: Limits) -> dict[str, StepFunction]:
        """The step function of each considered group, in the graph's order; flat where there is none."""
        considered = limits.considered(graph.groups)
        steps = self.steps(graph, scores, limits)
        none = np.zeros(0)
        return {
            g.name: steps.get(g.name, StepFunction(np.arange(g.size), none, none.astype(np.int64)))
            for g in considered
        }


def _checked(limits: Limits | None, graph: Graph) -> Limits:
    if limits is None:
        return Limits()
    if not isinstance(limits, Limits):
        raise SettingError(
            f"allocate: expected limits to be Limits or None, got {limits!r}. "
            "Write Limits(round_to=8), for example."
        )
    if not any(isinstance(part, nn.Module) for part in limits.ignore):
        return limits
    model = getattr(graph, "model", None)  # a graph of experts has it; others have its tensors
    return limits.named(graph.program.state_dict if model is None else dict(model.named_parameters()))
