"""The targets that remove units together with experts or blocks, under one budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType, SimpleNamespace
from typing import Any, ClassVar

from torch import nn

from secateur.allocators import Budget, Global, RepairAware, ToD, Uniform
from secateur.allocators.base import Allocator
from secateur.allocators.registry import Allocates
from secateur.allocators.unit_distortions import with_unit_curves
from secateur.calibration import Calibration
from secateur.common.formatting import percent
from secateur.graph.graph import Graph
from secateur.pipeline.auto.auto import UNITS as OF_UNITS
from secateur.pipeline.result import clock, few
from secateur.pipeline.targets.blocks import CANDIDATES as OF_BLOCKS
from secateur.pipeline.targets.blocks import Blocks
from secateur.pipeline.targets.experts import Experts
from secateur.pipeline.targets.headsizes import UnitsAndHeadSizes
from secateur.pipeline.targets.target import Scored, Target, Task
from secateur.pipeline.targets.units import Units
from secateur.plan import Plan
from secateur.proof.verify import Proof
from secateur.repairs.methods import Methods, Work, listed, quick
from secateur.repairs.methods import resolve as resolve_repairs
from secateur.repairs.repair import repair as repair_units
from secateur.signals import Scores
from secateur.signals.units.combination import name_of
from secateur.targets.blocks.apply import FORMS, removed_blocks
from secateur.targets.blocks.repair import bypass
from secateur.targets.defaults import BLOCKS
from secateur.targets.experts.repair import REPAIRS, check_methods
from secateur.targets.experts.repair import repair as repair_experts
from secateur.targets.together import apply as experts
from secateur.targets.together import blocks
from secateur.targets.together.graph import Joined, joined, part
from secateur.targets.together.rule import ONE_KNOB, Pair, Together
from secateur.targets.together.score import merged, score
from secateur.targets.units.apply import apply as apply_units
from secateur.targets.units.record import Record, attach, with_note

WITH_EXPERTS: Mapping[str, Callable[[], Together]] = MappingProxyType(
    {
        "tod": lambda: Together.of("tod"),
        "tod, reconstruction and fisher": lambda: Together.of(
            ToD(removal="reconstruction", protection="fisher")
        ),
        "emp": lambda: Together.of("emp"),
        "uniform": lambda: Together.of("uniform"),
        "uniform, reconstruction": lambda: Together.of(Uniform(removal="reconstruction")),
        "units alone, emp": lambda: replace(Together.of("emp"), share=0.0),
        "units alone, uniform, reconstruction": lambda: replace(
            Together.of(Uniform(removal="reconstruction")), share=0.0
        ),
        "experts alone, tod": lambda: replace(Together.of("tod"), share=1.0),
        "experts alone, uniform": lambda: replace(Together.of("uniform"), share=1.0),
    }
)
"""The rules that ``auto`` compares: one knob for both, or all removed from units or experts alone."""


def _with_share(units: Allocator, blocks: Allocator, share: float) -> Callable[[], Together]:
    return lambda: Together(units, blocks, share, what="block")


WITH_BLOCKS: Mapping[str, Callable[[], Together]] = MappingProxyType(
    {
        **{
            f"units alone, {name}": _with_share(rule, BLOCKS["global"], 0.0)
            for name, rule in ((name, make()) for name, make in OF_UNITS.items())
            if isinstance(rule, Allocator)
        },
        **{
            f"{share:.0%} by blocks, {removal.replace('_', ' ')}": _with_share(
                RepairAware(), Global(removal=removal), share
            )
            for share in (0.25, 0.5, 0.75)
            for removal in ("output_change", "stream_change")
        },
        **{
            f"blocks alone, {name}": _with_share(RepairAware(), make(), 1.0)
            for name, make in OF_BLOCKS.items()
        },
    }
)
"""The rules that ``auto`` compares: those for units alone, those for blocks alone, and shares in between."""


class Both(Units):
    """Removes units together with others (experts or blocks). Rules for units decide on the groups of both.

    Attributes:
        module: The Python module with `apply` and `verify` for both.
        units_target: The target class of the units.
        others_target: The target class of the others.
    """

    module: ClassVar[Any]
    units_target: ClassVar[type[Units]] = Units
    others_target: ClassVar[type[Target]]
    forms = FORMS
    default = "auto"
    budgets = (Budget(params=0.75), Budget(params=0.5))
    graph: Any

    def __init__(self, task: Task, graph: Joined | None = None) -> None:
        """Trace the model, unless a graph is given."""
        self.units: Any = self.units_target(task, None if graph is None else graph.units)
        self.others: Any = self.others_target(self.units.task, None if graph is None else graph.others)
        super().__init__(self.units.task, graph or joined(self.units.graph, self.others.graph))

    @property
    def _program(self) -> Graph:
        """The graph of the units."""
        found: Graph = self.units.graph
        return found

    def trace(self, model: nn.Module) -> Any:
        """Trace the model twice, and join the groups of both."""
        return joined(self.units.trace(model), self.others.trace(model))

    def score_signals(self, signals: Sequence[Any]) -> Scores:
        """Score units and others, each by their own signals."""
        task = self.task
        return score(
            self.graph, task.fit, signals, loss_fn=task.loss_fn, seed=task.seed, progress=task.progress
        )

    def score_candidates(self, rules: Iterable[Allocates]) -> Scored:
        """Score for candidates. A pair of signals is missing if the data cannot provide one of them."""
        both = [self.rule(rule) for rule in rules]
        stand_ins: list[list[Any]] = [  # in place of rules: only their signals are read
            [SimpleNamespace(signals=[getattr(pair, side) for pair in rule.pairs]) for rule in both]
            for side in ("unit", "other")
        ]
        units, others = self.units.score_candidates(stand_ins[0]), self.others.score_candidates(stand_ins[1])
        missing: dict[str, str] = {}
        pairs: dict[str, Pair] = {}
        for pair in (pair for rule in both for pair in rule.pairs):
            why = units.missing.get(name_of(pair.unit)) or others.missing.get(name_of(pair.other))
            if why is None:
                pairs[pair.name] = pair
            else:
                missing[pair.name] = why
        return Scored(merged(pairs.values(), units.scores, others.scores), missing)

    @staticmethod
    def with_curves(rule: Any, graph: Any, data: Any, scores: Any, *, progress: bool = False) -> Any:
        """Return the rule; its rule for units has the distortion curves that it measures."""
        both = Together.of(rule, graph.others.granularity)
        known = both.of_units_alone(graph.units, scores)
        units = with_unit_curves(both.units, graph.units, data, known, progress=progress)
        return replace(both, units=units)

    def with_measurements(self, rule: Any, data: Calibration, scores: Scores) -> Any:
        """Return the rule; its rule for units has everything that it measures on data."""
        both = self.rule(rule)
        known = replace(scores, values=both.of_units_alone(self._program, scores.values))
        return (
            both
            if both.share == 1
            else replace(both, units=self.units.with_measurements(both.units, data, known))
        )

    def default_budget(self, scored: Scored) -> Budget:
        """Return the parameters that ``tod`` leaves by default; ``emp`` if ``tod`` lacks scores."""
        rule = next(
            (r for r in map(self.rule, ("tod", "emp")) if all(p.name in scored.scores for p in r.pairs)),
            self.rule("uniform"),
        )
        return Budget(params=self.allocate(rule, scored.scores, None).predicted.params)

    def plan_and_apply(self, rule: Any, scores: Scores, budget: Budget | None) -> tuple[nn.Module, Plan]:
        """Plan and apply. The note says how much the others save, and how much the units."""
        small, plan = super().plan_and_apply(rule, scores, budget)
        names = {group.name for group in self.graph.others.groups}
        others = {group.name: group.keep for group in plan.groups if group.name in names}
        whole, between, least = plan.dense, self.graph.cost(others), plan.predicted
        params, macs = (
            [percent(getattr(a, name) - getattr(b, name), getattr(whole, name)) for a, b in steps]
            for name in ("params", "macs")
            for steps in [((whole, between), (between, least))]
        )
        note = (
            f"{self.graph.others.granularity.capitalize()}s save {params[0]} of the parameters and {macs[0]} "
            f"of the MACs, units another {params[1]} and {macs[1]}."
        )
        return with_note(small, note), plan

    def verify(self, small: nn.Module, plan: Plan) -> Proof:
        """Compare with the dense model with masked units and without the removed others."""
        found: Proof = self.module.verify(self.task.model, small, plan, self._example, graph=self.graph)
        return found

    def apply(self, plan: Plan) -> nn.Module:
        """Apply a plan in the form that the user asked for."""
        task = self.task
        with clock(task.seconds, "apply"):
            small: nn.Module = self.module.apply(
                task.model,
                plan,
                task.form,
                graph=self.graph,
                example_inputs=self._example,
                on_unrealisable=task.on_unrealisable,
            )
        return small

    @property
    def _example(self) -> Any:
        return few(self.task.example, self.graph.static_batch)


class UnitsAndExperts(Both):
    """Removes units and experts. A rule for units decides on the groups of both."""

    others_target = Experts
    candidates = WITH_EXPERTS
    compared = ONE_KNOB
    refused: ClassVar[Mapping[str, str]] = {
        "steps": "rounds remove units or experts, not both",
        "allow_inexact": "only what leaves the rest unchanged is removed together with experts",
    }
    module: ClassVar[Any] = experts

    @staticmethod
    def rule(allocator: Any) -> Any:
        """Return a rule with one knob for units and experts, or with one rule for each and a share."""
        return Together.of(allocator)

    @staticmethod
    def check_repair(repair: Methods) -> None:
        """Check the repairs of units and those of experts."""
        Units.check_repair(_of_units(repair))
        check_methods("prune(granularity=['unit', 'expert'], repair", _of_experts(repair))

    @property
    def _methods(self) -> Sequence[Any]:
        """The repairs that the units of candidates get."""
        repair = _of_units(self.task.repair)
        return next(iter(resolve_repairs("reconstruct" if repair == "auto" else quick(repair))), ())

    @property
    def candidate_repair(self) -> str:
        """Names of the repairs that candidates get, of units and of experts."""
        of_experts = check_methods("prune(repair", _of_experts(self.task.repair))
        return " + ".join([*(method.name for method in self._methods), *of_experts])

    def candidate(self, plan: Plan, data: Calibration) -> nn.Module:
        """Mask the units, remove the experts, and repair the result on `data` without measuring it."""
        small = apply_units(self.task.model, part(plan, "unit"), "masked")
        for method in self._methods:
            method.run(small, Work(lambda: self.graph.units, data))
        return self._without_experts(small, plan, data, lambda _, better: better)

    def repaired(self, small: nn.Module, plan: Plan) -> nn.Module:
        """Repair the units while all experts are still there; then remove experts, and refit the rest."""
        task = self.task
        if task.repair is None:
            return small

        inputs = few(task.example, self.graph.static_batch)
        fewer = repair_units(
            experts.without_units(task.model, plan, self.graph, inputs, task.on_unrealisable),
            task.model,
            task.data,
            _of_units(task.repair),
            graph=self.graph.units,
            loss_fn=task.loss_fn,
            seed=task.seed,
            progress=task.progress,
        )
        return self._without_experts(fewer, plan, task.fit, self.others.accepted)

    def _without_experts(
        self,
        small: nn.Module,
        plan: Plan,
        data: Calibration,
        accepted: Callable[[nn.Module, nn.Module], nn.Module],
    ) -> nn.Module:
        """Also remove the plan's experts, and refit the remaining ones.

        Args:
            small: The model without the plan's units.
            plan: What is removed.
            data: The data to refit on.
            accepted: Chooses between the model before and after the refit.
        """
        task = self.task
        fewer = experts.without_experts(small, task.model, plan, self.graph)
        methods = _of_experts(task.repair)
        if methods is None or not any(group.removed for group in part(plan, "expert").groups):
            return fewer
        known = self.graph.others  # their names hold for the model without the units too
        better = repair_experts(fewer, small, data, methods, graph=known, seed=task.seed, progress=False)
        return accepted(fewer, better)


class UnitsAndBlocks(Both):
    """Removes units and residual blocks. Blocks save a share of the budget, and units save the rest."""

    others_target = Blocks
    candidates = WITH_BLOCKS
    compared = ("repair_aware", "tod", "emp", "uniform", "global", "random")
    refused: ClassVar[Mapping[str, str]] = {
        "steps": "rounds remove units or blocks, not both",
        "allow_inexact": "only what leaves the rest unchanged is removed together with blocks",
    }
    module: ClassVar[Any] = blocks

    @staticmethod
    def rule(allocator: Any) -> Any:
        """Return a rule for units and one for blocks, with the share that blocks save."""
        return Together.of(allocator, "block")

    def candidate(self, plan: Plan, data: Calibration) -> nn.Module:
        """Mask the units, bypass the blocks, and repair the result on `data` without measuring it."""
        plan = blocks.whole_where_dropped(self.task.model, plan)
        small = apply_units(self.task.model, part(plan, "unit").of_graph(), "masked")
        bypass(small, removed_blocks(self.graph.others, plan))
        attach(small, Record(plan, "masked"))
        for method in self._methods:
            method.run(small, Work(lambda: self.graph.units, data))
        return small


class UnitsHeadSizesAndBlocks(UnitsAndBlocks):
    """Removes units except whole heads, dimensions of heads, and residual blocks."""

    units_target = UnitsAndHeadSizes


def _of_units(repair: Methods) -> Methods:
    """Return the repairs without those of experts; None if none is left."""
    if repair is None or repair == "auto":
        return repair
    return tuple(name for name in listed(repair) if name not in REPAIRS) or None


def _of_experts(repair: Methods) -> Methods:
    """Return the repairs of experts; None if there is none."""
    if repair is None or repair == "auto":
        return repair
    return tuple(name for name in listed(repair) if name in REPAIRS) or None
