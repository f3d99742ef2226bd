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
"""The rules that ``auto`` compares. Directions are uncorrelated, so their errors are exact and add up."""


class Ranks(Units):
    """Replaces linear layers by pairs of layers with few directions in between.

    First a copy of the model is factorised: it has pairs of layers and computes the same. The copy is traced,
    scored and pruned like the units of any model. Results are still compared with the dense model.
    """

    candidates: ClassVar[Mapping[str, Callable[[], Any]]] = CANDIDATES
    budgets: ClassVar[tuple[Budget, ...]] = (Budget(params=0.9), Budget(params=0.75))
    refused: ClassVar[Mapping[str, str]] = {
        "steps": "rounds trace a smaller model anew, whose pairs of layers have no layer to go back to",
    }
    traced: ClassVar[Callable[..., RankGraph]] = staticmethod(trace.trace)
    graph: Any

    def __init__(self, task: Task, graph: RankGraph | None = None) -> None:
        """Factorise the model and trace it, unless a graph is given."""
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
        return super().trace(self.factorised)

    def score_signals(self, signals: Sequence[Any]) -> Scores:
        """Score these signals on the factorised model."""
        return self._of_pairs.score_signals(signals)

    def score_candidates(self, rules: Iterable[Allocates]) -> Scored:
        """Score all signals of these rules that the data can provide, in one pass."""
        return self._of_pairs.score_candidates(rules)

    def with_measurements(self, rule: Any, data: Calibration, scores: Scores) -> Any:
        """Give `RepairAware` a factor for each group: how much the group's error changes the outputs."""
        if isinstance(rule, RepairAware) and not rule.factors and "reconstruction" in rule.signals:
            if not self._factors:
                weighted = weighted_by_outputs(rule, self.graph, data, scores, seed=self.task.seed)
                self._factors.update(weighted.factors)
            return replace(rule, factors=self._factors, parts=0)
        return super().with_measurements(rule, data, scores)

    def allocate(
        self, rule: Any, scores: Scores, budget: Budget | None, limits: Limits | None = None
    ) -> Plan:
        """Make the rule's plan; layers stay whole if the pair would cost more than the layer."""
        plan: Plan = super().allocate(rule, scores, budget, limits)
        return without_losses(self.graph, plan)

    def default_budget(self, scored: Scored) -> Budget:
        """Return three quarters of the parameters: no rule can decide without a budget here."""
        return Budget(params=0.75)

    def candidate(self, plan: Plan, data: Calibration) -> nn.Module:
        """Apply a plan in the form that is fastest to make, and repair the result."""
        update = {"fingerprint": fingerprint(self.factorised), "granularity": "unit"}
        return self._of_pairs.candidate(plan.model_copy(update=update).of_graph(), data)

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
        """Compare with the masked factorised model, and each pair with the dense layer of their product."""
        return verify(self.factorised, small, plan, few(self.task.example, self.graph.static_batch))

    def repaired(self, small: nn.Module, plan: Plan) -> nn.Module:
        """Run the requested repair, and keep what lowers the error on held-out data."""
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
    """Removes directions of linear layers, and channels, neurons and heads, under one budget."""

    candidates: ClassVar[Mapping[str, Callable[[], Any]]] = {
        name: make for name, make in CANDIDATES.items() if name != "emp, reconstruction"
    }
    budgets: ClassVar[tuple[Budget, ...]] = (Budget(params=0.8), Budget(params=0.6))
    traced: ClassVar[Callable[..., RankGraph]] = staticmethod(together.trace)

    def plan_and_apply(self, rule: Any, scores: Scores, budget: Budget | None) -> tuple[nn.Module, Plan]:
        """Plan and apply. The note says how much units save, and how much directions."""
        small, plan = super().plan_and_apply(rule, scores, budget)
        units = {group.name: group.keep for group in plan.groups if group.name not in self.graph.uncorrelated}
        whole, between, least = (c.params for c in (plan.dense, self.graph.cost(units), plan.predicted))
        note = (
            f"Units alone take {percent(whole - between, whole)} of the parameters, directions another "
            f"{percent(between - least, whole)}."
        )
        return with_note(small, note), plan
