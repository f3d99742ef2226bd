"""Units and experts as what is removed, under one budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType, SimpleNamespace
from typing import Any, ClassVar

from torch import nn

from secateur.allocators import EMP, Budget, ToD, Uniform
from secateur.allocators.registry import Allocates
from secateur.calibration import Calibration
from secateur.graph.graph import Graph
from secateur.pipeline.result import clock, few
from secateur.pipeline.targets.experts import Experts
from secateur.pipeline.targets.target import Scored, Task
from secateur.pipeline.targets.units import Units
from secateur.plan import Plan
from secateur.proof.verify import Proof
from secateur.repairs.methods import Methods, Work, listed, quick
from secateur.repairs.methods import resolve as resolve_repairs
from secateur.repairs.repair import repair as repair_units
from secateur.signals import Scores
from secateur.signals.units.combination import name_of
from secateur.targets.experts.apply import FORMS
from secateur.targets.experts.repair import REPAIRS, check_methods
from secateur.targets.experts.repair import repair as repair_experts
from secateur.targets.together.apply import apply, verify, without_experts, without_units
from secateur.targets.together.graph import UnitsAndExperts, part, trace
from secateur.targets.together.rule import RULES, Pair, Together
from secateur.targets.together.score import merged, score
from secateur.targets.units.apply import apply as apply_units

CANDIDATES: Mapping[str, Callable[[], Together]] = MappingProxyType(
    {
        "tod": lambda: Together(*RULES["tod"]),
        "tod, reconstruction and fisher": lambda: Together(
            ToD(removal="reconstruction", protection="fisher"), RULES["tod"][1]
        ),
        "emp": lambda: Together(*RULES["emp"]),
        "uniform": lambda: Together(*RULES["uniform"]),
        "uniform, reconstruction": lambda: Together(Uniform(removal="reconstruction"), RULES["uniform"][1]),
        "units alone, emp": lambda: Together(EMP(), RULES["emp"][1], only="unit"),
        "units alone, uniform, reconstruction": lambda: Together(
            Uniform(removal="reconstruction"), RULES["uniform"][1], only="unit"
        ),
        "experts alone, tod": lambda: Together(*RULES["tod"], only="expert"),
        "experts alone, uniform": lambda: Together(*RULES["uniform"], only="expert"),
    }
)
"""What ``auto`` compares: one knob for both, and the same budget spent on units or on experts alone."""


class Both(Units):
    """Units and experts. What a rule for units does, it does for the groups of both."""

    forms = FORMS
    default = "auto"
    candidates = CANDIDATES
    compared = tuple(RULES)
    budgets = (Budget(params=0.75), Budget(params=0.5))
    refused: ClassVar[Mapping[str, str]] = {
        "steps": "rounds remove units or experts, not both",
        "allow_inexact": "only what leaves the rest unchanged is removed together with experts",
    }
    graph: Any

    def __init__(self, task: Task, graph: UnitsAndExperts | None = None) -> None:
        """Traces the model, unless its graph is at hand."""
        super().__init__(task, graph)
        self.units, self.experts = Units(task, self.graph.units), Experts(task, self.graph.experts)

    @property
    def _program(self) -> Graph:
        """The graph of the units."""
        return self.units.graph

    @staticmethod
    def rule(allocator: Any) -> Any:
        """A rule whose knob means the same for units and for experts."""
        return Together.of(allocator)

    @staticmethod
    def check_repair(repair: Methods) -> None:
        """Any repair of units, and those of experts."""
        Units.check_repair(_of_units(repair))
        check_methods("prune(granularity=['unit', 'expert'], repair", _of_experts(repair))

    def trace(self, model: nn.Module) -> Any:
        """Groups of units and blocks of experts."""
        return trace(model, self.task.example.inputs)

    def score_signals(self, signals: Sequence[Any]) -> Scores:
        """Each side by its own signals."""
        task = self.task
        return score(
            self.graph, task.fit, signals, loss_fn=task.loss_fn, seed=task.seed, progress=task.progress
        )

    def scored(self, rules: Iterable[Allocates]) -> Scored:
        """A pair is missing where one of its signals cannot be measured."""
        both = [Together.of(rule) for rule in rules]
        asked: list[list[Any]] = [  # rules of which only the signals are read
            [SimpleNamespace(signals=[getattr(pair, side) for pair in rule.pairs]) for rule in both]
            for side in ("unit", "expert")
        ]
        units, experts = self.units.scored(asked[0]), self.experts.scored(asked[1])
        missing: dict[str, str] = {}
        pairs: dict[str, Pair] = {}
        for pair in (pair for rule in both for pair in rule.pairs):
            why = units.missing.get(name_of(pair.unit)) or experts.missing.get(name_of(pair.expert))
            if why is None:
                pairs[pair.name] = pair
            else:
                missing[pair.name] = why
        return Scored(merged(pairs.values(), units.scores, experts.scores), missing)

    @staticmethod
    def with_curves(rule: Any, graph: Any, data: Any, scores: Scores, *, progress: bool = False) -> Any:
        """The rule as it is: none for both needs curves."""
        return rule

    def default_budget(self, scored: Scored) -> Budget:
        """The parameters that ``tod`` leaves at its default tolerance, or ``emp`` where it cannot decide."""
        rule = next(
            (r for r in map(Together.of, ("tod", "emp")) if all(p.name in scored.scores for p in r.pairs)),
            Together.of("uniform"),
        )
        return Budget(params=self.allocate(rule, scored.scores, None).predicted.params)

    @property
    def _methods(self) -> Sequence[Any]:
        """Of units, for candidates."""
        asked = _of_units(self.task.repair)
        return next(iter(resolve_repairs("reconstruct" if asked == "auto" else quick(asked))), ())

    @property
    def candidate_repair(self) -> str:
        """The repairs of both that were asked for."""
        experts = check_methods("prune(repair", _of_experts(self.task.repair))
        return " + ".join([*(method.name for method in self._methods), *experts])

    def candidate(self, plan: Plan, data: Calibration) -> nn.Module:
        """The model with masked units, without the experts; repaired without looking whether it helps."""
        small = apply_units(self.task.model, part(plan, "unit"), "masked")
        for method in self._methods:
            method.run(small, Work(lambda: self.graph.units, data))
        return self._without_experts(small, plan, data, lambda _, better: better)

    def apply(self, plan: Plan) -> nn.Module:
        """The module without both."""
        task = self.task
        with clock(task.seconds, "apply"):
            return apply(
                task.model,
                plan,
                task.form,
                graph=self.graph,
                example_inputs=few(task.example, self.graph.static_batch),
                on_unrealisable=task.on_unrealisable,
            )

    def verify(self, small: nn.Module, plan: Plan) -> Proof:
        """With the masked dense model whose routers may not choose the removed experts."""
        inputs = few(self.task.example, self.graph.static_batch)
        return verify(self.task.model, small, plan, inputs, graph=self.graph)

    def repaired(self, small: nn.Module, plan: Plan) -> nn.Module:
        """First the units are repaired, while all experts are there; then the experts that stay are."""
        task = self.task
        if task.repair is None:
            return small

        inputs = few(task.example, self.graph.static_batch)
        fewer = repair_units(
            without_units(task.model, plan, self.graph, inputs, task.on_unrealisable),
            task.model,
            task.data,
            _of_units(task.repair),
            graph=self.graph.units,
            loss_fn=task.loss_fn,
            seed=task.seed,
            progress=task.progress,
        )
        return self._without_experts(fewer, plan, task.fit, self.experts.accepted)

    def _without_experts(
        self,
        small: nn.Module,
        plan: Plan,
        data: Calibration,
        accepted: Callable[[nn.Module, nn.Module], nn.Module],
    ) -> nn.Module:
        """The model without its experts too, and those that stay refitted.

        Args:
            small: The model without the plan's units.
            plan: What is removed.
            data: To refit on.
            accepted: Chooses between the model before and after the refit.
        """
        task = self.task
        fewer = without_experts(small, task.model, plan, self.graph)
        methods = _of_experts(task.repair)
        if methods is None or not any(group.removed for group in part(plan, "expert").groups):
            return fewer
        blocks = self.graph.experts  # their names hold for the model without the units too
        better = repair_experts(fewer, small, data, methods, graph=blocks, seed=task.seed, progress=False)
        return accepted(fewer, better)


def _of_units(repair: Methods) -> Methods:
    """The repairs but those of experts; None if none is left."""
    if repair is None or repair == "auto":
        return repair
    return tuple(name for name in listed(repair) if name not in REPAIRS) or None


def _of_experts(repair: Methods) -> Methods:
    """The repairs of experts; None if none is asked for."""
    if repair is None or repair == "auto":
        return repair
    return tuple(name for name in listed(repair) if name in REPAIRS) or None
