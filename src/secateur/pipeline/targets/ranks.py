"""The targets ``rank`` and ``unit+rank``: directions of linear layers, alone or with units."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, ClassVar

from torch import nn

from secateur.allocators import EMP, Budget, Global, Limits, RepairAware, Uniform
from secateur.allocators.registry import Allocates
from secateur.calibration import Calibration
from secateur.common.formatting import percent
from secateur.graph.graph import Graph, fingerprint
from secateur.pipeline.auto.outputs import weighted_by_outputs
from secateur.pipeline.result import clock, few
from secateur.pipeline.targets.target import Scored, Task
from secateur.pipeline.targets.units import Units
from secateur.plan import Plan
from secateur.proof.verify import Proof
from secateur.repairs.repair import repair
from secateur.signals import Scores
from secateur.targets.lowrank import together, trace
from secateur.targets.lowrank.apply import apply, verify
from secateur.targets.lowrank.factorise import factorise
from secateur.targets.lowrank.graph import RankGraph
from secateur.targets.lowrank.saving import without_losses
from secateur.targets.units.record import with_note

CANDIDATES: Mapping[str, Callable[[], Allocates]] = MappingProxyType(
    {
        "repair_aware": RepairAware,
        "repair_aware by params": lambda: RepairAware(per="params"),
        "global, reconstruction": lambda: Global(removal="reconstruction", normalise="none"),
        "uniform, reconstruction": lambda: Uniform(removal="reconstruction"),
        "emp, reconstruction": lambda: EMP(removal="reconstruction"),
    }
)
"""What ``auto`` compares. Directions are known to be uncorrelated, so their errors are exact and add up."""


class Ranks(Units):
    """Replaces linear layers by two layers with few directions in between.

    The model is factorised first: it then computes the same, with pairs of layers. That copy is traced,
    scored and decided on like any model's units; the dense model stays what is compared with.
    """

    candidates: ClassVar[Mapping[str, Callable[[], Any]]] = CANDIDATES
    budgets: ClassVar[tuple[Budget, ...]] = (Budget(params=0.9), Budget(params=0.75))
    refused: ClassVar[Mapping[str, str]] = {
        "steps": "rounds trace a smaller model anew, whose pairs of layers have no layer to go back to",
    }
    traced: ClassVar[Callable[..., RankGraph]] = staticmethod(trace.trace)
    graph: Any

    def __init__(self, task: Task, graph: RankGraph | None = None) -> None:
        """Factorise the model and trace it, unless its graph is at hand."""
        known = None if graph is None else graph.programs.model
        with clock(task.seconds, "factorise"):
            self._factorised = known or factorise(task.model, task.fit, progress=task.progress)
        super().__init__(task, graph)
        self._factorised = self.graph.programs.model or self._factorised
        self._factors: dict[str, float] = {}
        self._of_pairs = Units(replace(task, model=self.factorised), self.graph)

    @property
    def factorised(self) -> nn.Module:
        """The model with pairs of layers."""
        return self._factorised

    def trace(self, model: nn.Module) -> Graph:
        """Trace the factorised model."""
        return self.traced(self.factorised, self.task.example.inputs, allow_inexact=self.task.allow_inexact)

    def score_signals(self, signals: Sequence[Any]) -> Scores:
        """The scores of these signals."""
        return self._of_pairs.score_signals(signals)

    def scored(self, rules: Iterable[Allocates]) -> Scored:
        """Score all signals of these rules that the data are enough for, in one pass."""
        return self._of_pairs.scored(rules)

    def measured(self, rule: Any, data: Calibration, scores: Scores) -> Any:
        """Give `RepairAware` factors that say how much the errors of each group change the outputs."""
        if isinstance(rule, RepairAware) and not rule.factors and "reconstruction" in rule.signals:
            if not self._factors:
                weighted = weighted_by_outputs(rule, self.graph, data, scores, seed=self.task.seed)
                self._factors.update(weighted.factors)
            return replace(rule, factors=self._factors, parts=0)
        return super().measured(rule, data, scores)

    def allocate(
        self, rule: Any, scores: Scores, budget: Budget | None, limits: Limits | None = None
    ) -> Plan:
        """The rule's plan, in which no layer becomes two that cost more."""
        plan: Plan = super().allocate(rule, scores, budget, limits)
        return without_losses(self.graph, plan)

    def default_budget(self, scored: Scored) -> Budget:
        """Three quarters of the parameters: no rule has a choice of its own for errors of directions."""
        return Budget(params=0.75)

    def candidate(self, plan: Plan, data: Calibration) -> nn.Module:
        """Apply a plan in the form that is fastest to make, and repair the result."""
        update = {"fingerprint": fingerprint(self.factorised), "granularity": "unit"}
        return self._of_pairs.candidate(plan.model_copy(update=update).of_graph(), data)

    def intermediate(self, plan: Plan) -> nn.Module:
        """Rounds are refused."""
        return self.apply(plan)

    def apply(self, plan: Plan) -> nn.Module:
        """Apply a plan in the form that the user asked for."""
        task = self.task
        with clock(task.seconds, "apply"):
            return apply(
                self.factorised,
                plan,
                task.form,
                example_inputs=few(task.example, self.graph.static_batch),
                on_unrealisable=task.on_unrealisable,
            )

    def verify(self, small: nn.Module, plan: Plan) -> Proof:
        """With the masked factorised model, and with the dense layers that hold the products."""
        return verify(self.factorised, small, plan, few(self.task.example, self.graph.static_batch))

    def repaired(self, small: nn.Module, plan: Plan) -> nn.Module:
        """As far as it helps on held-out data."""
        task = self.task
        return repair(
            small,
            self.factorised,
            task.data,
            task.repair,
            loss_fn=task.loss_fn,
            seed=task.seed,
            progress=task.progress,
        )


class UnitsAndRanks(Ranks):
    """Directions of linear layers, and channels, neurons and heads, in one allocation under one budget."""

    candidates: ClassVar[Mapping[str, Callable[[], Any]]] = {
        name: make for name, make in CANDIDATES.items() if name != "emp, reconstruction"
    }
    budgets: ClassVar[tuple[Budget, ...]] = (Budget(params=0.8), Budget(params=0.6))
    traced: ClassVar[Callable[..., RankGraph]] = staticmethod(together.trace)

    def carry_out(self, rule: Any, scores: Scores, budget: Budget | None) -> tuple[nn.Module, Plan]:
        """Plan and apply. The note says how much went along each axis."""
        small, plan = super().carry_out(rule, scores, budget)
        units = {group.name: group.keep for group in plan.groups if group.name not in self.graph.uncorrelated}
        whole, between, least = (c.params for c in (plan.dense, self.graph.cost(units), plan.predicted))
        said = (
            f"Units alone take {percent(whole - between, whole)} of the parameters, directions another "
            f"{percent(between - least, whole)}."
        )
        return with_note(small, said), plan
