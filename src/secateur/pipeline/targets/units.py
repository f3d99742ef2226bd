"""The target ``unit``: channels, neurons and heads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from typing import Any, ClassVar, cast

from torch import nn

from secateur.allocators import Budget, Limits, RepairAware, ToD, resolve
from secateur.allocators.registry import Allocates
from secateur.allocators.unit_distortions import with_unit_curves
from secateur.calibration import Calibration
from secateur.errors import ApplyError, BudgetError
from secateur.graph.graph import Graph
from secateur.graph.trace import trace
from secateur.pipeline.auto.auto import UNITS, Auto
from secateur.pipeline.auto.choosers import CHOOSERS
from secateur.pipeline.auto.depth import weighted_by_depth
from secateur.pipeline.auto.scored import score_candidates
from secateur.pipeline.expressible import plan_until_expressible
from secateur.pipeline.result import clock, few, traced_on_few
from secateur.pipeline.shortage import shortage
from secateur.pipeline.targets.target import Form, Scored, Target
from secateur.plan import Plan
from secateur.proof.verify import Proof, verify
from secateur.repairs.methods import Methods, Work, quick
from secateur.repairs.methods import resolve as resolve_repairs
from secateur.signals import Scores
from secateur.signals.distributed import team_of_processes
from secateur.signals.units.combination import name_of
from secateur.targets.units.apply import FORMS, Applier
from secateur.targets.units.record import record_of, with_note


class Units(Target):
    """Removes channels, neurons, heads and hidden units. Tensors get smaller."""

    forms: ClassVar[tuple[str, ...]] = FORMS
    default = Auto.name
    candidates = UNITS
    compared: ClassVar[tuple[str, ...]] = ("repair_aware", "tod", "emp", "uniform", "global", "random")
    budgets: ClassVar[tuple[Budget, ...]] = (Budget(macs=0.8), Budget(macs=0.6), Budget(macs=0.4))
    traced: ClassVar[Callable[..., Any]] = staticmethod(cast(Any, trace))
    graph: Graph

    @staticmethod
    def rule(allocator: Any) -> Any:
        """Return the rule with this name, or the rule itself. Any rule works."""
        return resolve(allocator, also=tuple(CHOOSERS))

    @staticmethod
    def check_repair(repair: Methods) -> None:
        """Accept any repair of `sc.repair`, and refuse others."""
        resolve_repairs(repair)

    def trace(self, model: nn.Module) -> Graph:
        """Trace a model."""
        options = {"allow_inexact": self.task.allow_inexact}
        found: Graph = traced_on_few(lambda inputs: self.traced(model, inputs, **options), self.task.example)
        return found

    def score_candidates(self, rules: Iterable[Allocates]) -> Scored:
        """Score all signals of these rules that the data can provide, in one pass."""
        task = self.task
        return score_candidates(
            rules,
            self.graph,
            task.model,
            task.fit,
            loss_fn=task.loss_fn,
            seed=task.seed,
            progress=task.progress,
        )

    @staticmethod
    def with_curves(rule: Any, graph: Graph, data: Any, scores: Scores, *, progress: bool = False) -> Any:
        """Return the rule with the distortion curves that it measures on data, if it needs some."""
        return with_unit_curves(rule, graph, data, scores, progress=progress)

    def with_measurements(self, rule: Any, data: Calibration, scores: Scores) -> Any:
        """Return the rule with its curves, and with the factors that `RepairAware(parts=...)` measures."""
        if isinstance(rule, RepairAware) and rule.parts:
            return weighted_by_depth(rule, self, data, scores)
        return super().with_measurements(rule, data, scores)

    def default_budget(self, scored: Scored) -> Budget:
        """Return the MACs that ``tod`` leaves with its default tolerance."""
        rule = ToD()
        lacking = [scored.missing[name_of(s)] for s in rule.signals if name_of(s) in scored.missing]
        if lacking or any(name_of(s) not in scored.scores for s in rule.signals):
            why = lacking[0] if lacking else "no candidate asks for its signals"
            raise BudgetError(
                "auto: expected a budget, or what tod needs to decide on one, got neither. Pass a budget: "
                f"Budget(macs=0.5), for example. For tod: {why}"
            )
        return Budget(macs=self.allocate(rule, scored.scores, None).predicted.macs)

    @property
    def _methods(self) -> Sequence[Any]:
        repair = self.task.repair
        return next(iter(resolve_repairs("reconstruct" if repair == "auto" else quick(repair))), ())

    @property
    def candidate_repair(self) -> str:
        """Names of the repairs that candidates get; ``reconstruct`` for ``auto``. None of them trains."""
        return " + ".join(method.name for method in self._methods)

    def candidate(self, plan: Plan, data: Calibration) -> nn.Module:
        """Apply a plan in the form that is fastest to make, and repair the result.

        That form is the captured program if all batches are like the traced inputs. It is another form if the
        user gives a loss or metric: such a function may pass targets to the model, or call its methods.
        """
        programs = self.graph.programs
        varied = (
            self.task.loss_fn is not None
            or self.task.metric is not None
            or any(
                not programs.first_is_right(b.args, b.kwargs)
                for part in (self.task.fit, self.task.held)
                for b in part
            )
        )
        form: Form = "masked" if all(group.exact for group in plan.groups) else "module"
        forms: tuple[Form, Form] = (form, "graph") if varied else ("graph", form)
        try:
            small = self._applied(plan, forms[0])
        except ApplyError:  # some models cannot be captured, and some groups need the captured program
            small = self._applied(plan, forms[1])
        for method in self._methods:
            method.run(small, Work(lambda: self.graph, data))
        return small

    @cached_property
    def _applied(self) -> Applier:
        return Applier(self.task.model, self.graph)

    def apply(self, plan: Plan) -> nn.Module:
        """Apply a plan in the form that the user asked for."""
        task = self.task
        with clock(task.seconds, "apply"):
            return self._applied(
                plan,
                task.form,
                example_inputs=few(task.example, self.graph.static_batch),
                on_unrealisable=task.on_unrealisable,
            )

    def plan_and_apply(self, rule: Any, scores: Scores, budget: Budget | None) -> tuple[nn.Module, Plan]:
        """Plan and apply. Plan again with fewer groups until a module can express the whole plan."""
        notes: list[str] = []  # for each plan, which groups its rounds could not prune

        def decide(limits: Limits | None) -> Plan:
            with clock(self.task.seconds, "allocate"):
                return _agreed(self.graph, partial(self._decide, rule, scores, budget, limits, notes))

        found = plan_until_expressible(decide, self.apply, self.task.limits)
        small = with_note(found.model, " ".join(filter(None, (found.note, *notes[-1:]))))
        return small, record_of(small).plan

    def _decide(
        self, rule: Any, scores: Scores, budget: Budget | None, limits: Limits | None, notes: list[str]
    ) -> Plan:
        """Make the plan, and append the note of its rounds to `notes`."""
        plan: Plan
        plan, note = self.decide(rule, scores, budget, limits)
        notes.append(note)
        return plan

    def apply_between_rounds(self, plan: Plan) -> nn.Module:
        """Apply a plan between two rounds, in whatever form works."""
        return self._applied(plan, on_unrealisable=self.task.on_unrealisable)

    @property
    def _program(self) -> Graph:
        """The graph whose layers repairs refit."""
        return self.graph

    def facts(self, small: nn.Module, plan: Plan, rule: Any, scores: Scores) -> dict[str, Any]:
        """Like `Target.facts`; if layers are refitted, also say which layer has too few data."""
        found = super().facts(small, plan, rule, scores)
        if self.task.repair is None:
            return found
        return {**found, "lacking": shortage(self._program, scores.samples or self.task.fit.samples())}

    def verify(self, small: nn.Module, plan: Plan) -> Proof:
        """Compare a pruned model with the masked dense model."""
        return verify(self.task.model, small, plan, few(self.task.example, self.graph.static_batch))


def _agreed(graph: Graph, allocate: Callable[[], Plan]) -> Plan:
    """Make a plan. If several processes work together (see `score`), all get the plan of the first one."""
    with team_of_processes(graph.device) as team:
        with team.together():
            plan = allocate()
        return plan if team.size == 1 else Plan.from_json(team.from_first(plan.to_json()))
