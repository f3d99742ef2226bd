"""The base class of all allocators.

An allocator has one number, its knob. `Allocator.steps` says how many units each group loses at each value of
the knob. This base class does the rest: it finds the value that meets a budget, applies limits, and builds
the plan.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, cast, final, overload

import numpy as np
from pydantic import JsonValue
from torch import nn

from secateur.allocators.budget import Budget
from secateur.allocators.curve import Curve, curve
from secateur.allocators.decision import Decision, decide
from secateur.allocators.description import Certificate, Description, listed
from secateur.allocators.limits import DEFAULTS, Limits
from secateur.allocators.signals import ScoreTable, table
from secateur.allocators.step_function import StepFunction
from secateur.common.seeds import seed_of
from secateur.errors import BudgetError, SettingError
from secateur.plan import Plan
from secateur.signals.scores import Scores
from secateur.signals.units.combination import SignalLike

if TYPE_CHECKING:
    from secateur.graph.graph import Graph
    from secateur.targets.blocks.graph import BlockGraph
    from secateur.targets.experts.graph import ExpertGraph
    from secateur.targets.weights.plan import MaskPlan
    from secateur.targets.weights.weights import Weights

# Threads and processes add numbers up in different orders, which changes the last digits. A plan keeps only
# the digits that do not depend on this, so its file is the same byte for byte on every run. Only a number
# that lies just between two roundings can differ.
DIGITS, KNOB_DIGITS = 4, 6
"""Significant digits of certificates, and of a knob that a budget solved for."""


class Allocator(ABC):
    """Decides how many units each group loses.

    An allocator has one knob. A higher value removes the same number of units or more from every group, never
    fewer. Only finitely many values change anything. Without a budget, `knob` gives the value. With a budget,
    the smallest value that meets the budget is used, so the cost is the largest within the budget. `curve`
    shows the result of all values.

    To write an allocator, derive from this class and define `name`, `signals`, `knob`, `settings` and
    `steps`. Reports describe it with its own `solved`, `knob_name` and `certificate`.

    Attributes:
        name: The name by which users choose it.
        solved: The entry of `settings` that is solved for a budget; empty if there is none.
        knob_name: Name of the knob on the axis of a plot. Empty: the name in `solved`.
        on_weights: Whether it can also decide on single weights.
        spends: Whether removed units may be put back one by one while a budget holds.
    """

    name: ClassVar[str]
    solved: ClassVar[str] = ""
    knob_name: ClassVar[str] = ""
    on_weights: ClassVar[bool] = True
    spends: ClassVar[bool] = True

    @property
    @abstractmethod
    def signals(self) -> tuple[SignalLike, ...]:
        """The signals whose scores the allocator needs: names, instances or combinations."""

    @abstractmethod
    def knob(self, budget: Budget | None) -> float | None:
        """The value of the knob without a budget. It is not used if there is a budget.

        Raises:
            SettingError: The settings do not fit, for example neither a value nor a budget was given.
        """

    def for_budget(self, budget: Budget | None) -> Allocator:
        """The rule with the settings that follow from a budget. By default there are none."""
        return self

    @abstractmethod
    def settings(self, knob: float | None) -> dict[str, JsonValue]:
        """The settings to store in the plan.

        Args:
            knob: The value of the knob that was used; None if nothing had to be removed.
        """

    @abstractmethod
    def steps(self, graph: Graph, scores: ScoreTable, limits: Limits) -> Mapping[str, StepFunction]:
        """How many units each group loses at each value of the knob.

        Args:
            graph: The traced model.
            scores: Scores of at least the signals in `signals`.
            limits: Decide on the groups ``limits.considered(graph.groups)``. The allowed numbers of removed
                units are ``limits.feasible(size)``; any other number is lowered to the next allowed one.

        Returns:
            One step function for each group name. A group without one loses nothing.

        Raises:
            ScoreError: The scores do not fit.
        """

    def certificates(
        self, graph: Graph, scores: ScoreTable, limits: Limits, decision: Decision
    ) -> dict[str, JsonValue]:
        """What the allocator guarantees or predicts for a decision, as data. Nothing by default."""
        return {}

    def certificate(self, found: Mapping[str, Any]) -> Certificate:
        """Turn the data of `certificates` into sentences and a table for a report.

        Args:
            found: The result of `certificates`, possibly read from a file of an older version.
        """
        return listed(found)

    def describe(self, certificates: Mapping[str, Any]) -> Description:
        """What a report shows about this allocator and its certificates."""
        return Description(
            setting=self.solved,
            knob=self.knob_name or self.solved or "knob",
            certificate=self.certificate(certificates) if certificates else None,
        )

    @overload
    def allocate(
        self,
        graph: Graph | ExpertGraph | BlockGraph,
        scores: Scores | ScoreTable,
        budget: Budget | None = None,
        limits: Limits | None = None,
        seed: int = 0,
    ) -> Plan: ...

    @overload
    def allocate(
        self,
        graph: Weights,
        scores: Scores | ScoreTable,
        budget: Budget | None = None,
        limits: Limits | None = None,
        seed: int = 0,
    ) -> MaskPlan: ...

    @final
    def allocate(
        self,
        graph: Graph | ExpertGraph | BlockGraph | Weights,
        scores: Scores | ScoreTable,
        budget: Budget | None = None,
        limits: Limits | None = None,
        seed: int = 0,
    ) -> Plan | MaskPlan:
        """Decide how many units of each group are removed, and which ones.

        If units are experts, each group is a block of experts. Each block keeps at least as many experts as a
        token uses. If a router divides its experts into groups, each of these groups loses the same number of
        experts: the first ones in the allocator's removal order.

        If units are single weights, each weight tensor is a group, and the plan is a `MaskPlan`.

        Args:
            graph: The traced model.
            scores: The result of `sc.score`, or a mapping from signal to group to one finite value for each
                unit [group.size]. Higher is worth more.
            budget: The most that the pruned model may cost. None: the allocator's own setting decides.
            limits: Bounds on what may be removed. None: the defaults; for single weights at least one of each
                tensor stays.
            seed: Stored in the plan.

        Returns:
            The plan. With a budget, the knob has the value whose cost is the largest within the budget. Then
            removed units are put back one by one as long as the budget holds, except with
            ``Budget(spend=False)``.

        Raises:
            ScoreError: A signal is missing, or its scores do not fit the groups or are of another model.
            SettingError: The allocator has no value for its knob, or an ignore pattern matches nothing.
            NothingToPruneError: No group is left to decide on.
            UnreachableBudgetError: No value of the knob meets the budget.
        """
        if budget is not None and not isinstance(budget, Budget):
            raise BudgetError(
                f"allocate: expected budget to be a Budget or None, got {budget!r}. "
                "Write Budget(macs=0.5), for example."
            )
        granularity, graph = graph.granularity, cast("Graph", graph)  # rules read groups and costs only
        rule, limits = graph.adapted(self.for_budget(budget), _checked(limits, graph))
        if budget is not None and not rule.spends:
            budget = replace(budget, spend=False)
        values = table(scores, graph, rule.signals)
        decision = rule.decide(graph, values, budget, limits)
        header: dict[str, Any] = {
            "allocator": rule.name,
            "settings": rule.settings(_written_knob(decision)) | {"limits": limits.as_settings()},
            "seed": seed_of(seed),
            "budget": None if budget is None else budget.as_settings(),
            "certificates": rounded(rule.certificates(graph, values, limits, decision)),
        }
        if granularity == "weight":
            from secateur.targets.weights.plan import MaskPlan  # which is made of what this package gives

            return MaskPlan.build(cast("Weights", graph), decision.keep, **header)
        return Plan.build(graph, decision.keep, **header).on(rule._curve(graph, limits, decision.steps))

    @final
    def curve(
        self,
        graph: Graph | ExpertGraph | BlockGraph,
        scores: Scores | ScoreTable,
        limits: Limits | None = None,
    ) -> Curve:
        """Compute MACs, parameters and kept units for every value of the knob.

        The allocator's own setting is not used: ``ToD().curve(graph, scores)`` covers all tolerances.

        Args:
            graph: The traced model.
            scores: As for `allocate`.
            limits: As for `allocate`.

        Returns:
            The curve. Every point is exact.

        Raises:
            ScoreError: A signal is missing, or its scores do not fit the groups or are of another model.
            SettingError: An ignore pattern matches nothing.
            NothingToPruneError: No group is left to decide on.
        """
        if cast("Any", graph).granularity == "weight":
            raise SettingError(
                "curve: expected a graph of units or experts, got one of single weights, whose zeros save "
                "no MACs. Call allocate with several budgets."
            )
        graph = cast("Graph", graph)
        rule, limits = graph.adapted(self, _checked(limits, graph))
        values = table(scores, graph, rule.signals)
        return rule._curve(graph, limits, rule._considered(graph, values, limits))

    def decide(self, graph: Graph, scores: ScoreTable, budget: Budget | None, limits: Limits) -> Decision:
        """Decide how many units each considered group loses. `allocate` builds its plan from this."""
        knob = self.knob(budget)
        return decide(graph, budget, limits, self._considered(graph, scores, limits), knob)

    def _curve(self, graph: Graph, limits: Limits, steps: Mapping[str, StepFunction]) -> Curve:
        knob_name = self.describe({}).knob
        return curve(self.name, graph, limits, steps, knob_name)

    def _considered(self, graph: Graph, scores: ScoreTable, limits: Limits) -> dict[str, StepFunction]:
        """The step function of each considered group, in the graph's order; by default without steps."""
        considered = limits.considered(graph.groups)
        steps = self.steps(graph, scores, limits)
        none = np.zeros(0)
        return {
            g.name: steps.get(g.name, StepFunction(np.arange(g.size), none, none.astype(np.int64)))
            for g in considered
        }


def _checked(limits: Limits | None, graph: Graph) -> Limits:
    if limits is None:
        return DEFAULTS.get(graph.granularity, Limits())
    if not isinstance(limits, Limits):
        raise SettingError(
            f"allocate: expected limits to be Limits or None, got {limits!r}. "
            "Write Limits(round_to=8), for example."
        )
    if not any(isinstance(part, nn.Module) for part in limits.ignore):
        return limits
    model = getattr(graph, "model", None)  # graphs of experts hold the model, other graphs hold its tensors
    return limits.named(graph.program.state_dict if model is None else dict(model.named_parameters()))


def _written_knob(decision: Decision) -> float | None:
    """The knob as the plan writes it: the user's own as it is, a solved one rounded up."""
    solved = decision.knob is not None and decision.budget is not None
    return rounded_up(float(decision.knob)) if solved else decision.knob  # type: ignore[arg-type]


def rounded(value: Any) -> Any:
    """The certificates, each number rounded to `DIGITS` digits. No order between two numbers is reversed.

    Example:
        >>> rounded({"sum": 0.123456, "kept": 123456, "groups": [1e-9 / 3, None]})
        {'sum': 0.1235, 'kept': 123456, 'groups': [3.333e-10, None]}
    """
    if isinstance(value, Mapping):
        return {name: rounded(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(entry) for entry in value]
    return float(f"{value:.{DIGITS - 1}e}") if isinstance(value, float) and math.isfinite(value) else value


def rounded_up(knob: float) -> float:
    """The knob, rounded up to `KNOB_DIGITS` digits, so that it removes no less than before.

    Example:
        >>> rounded_up(0.25), rounded_up(0.1), rounded_up(1 / 3), rounded_up(-1 / 3)
        (0.25, 0.1, 0.333334, -0.333333)
    """
    near = float(f"{knob:.{KNOB_DIGITS - 1}e}")
    if near >= knob or math.isclose(near, knob, rel_tol=1e-12) or not math.isfinite(knob):
        return near
    step = 10.0 ** (math.floor(math.log10(abs(knob))) - KNOB_DIGITS + 1)
    return float(f"{near + step:.{KNOB_DIGITS - 1}e}")
