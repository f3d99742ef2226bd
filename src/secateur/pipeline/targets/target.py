"""What is removed: the calls that `prune`, `choose` and `compare` make, whatever the granularity."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import nn

from secateur.allocators import Budget, Limits
from secateur.allocators.base import Allocator
from secateur.allocators.registry import Allocates
from secateur.calibration import Batch, Calibration
from secateur.errors import SettingError
from secateur.measure.cost import Cost
from secateur.measure.quality import Metric
from secateur.pipeline.result import clock, untouched
from secateur.pipeline.resuming import scored_once
from secateur.pipeline.steps import budget_after, plan_in_steps
from secateur.plan import Plan
from secateur.proof.verify import Proof
from secateur.repairs.judging import Judge
from secateur.repairs.methods import Method, Methods, quick
from secateur.repairs.repair import repair as repair_model
from secateur.report.collect import knob_of, layers_of
from secateur.signals import Scores
from secateur.signals.loss import LossFn
from secateur.signals.named import leaves
from secateur.signals.units.combination import name_of
from secateur.targets.units.apply import apply
from secateur.targets.units.composing import compose_plans, split
from secateur.targets.units.record import record_of

Form = Literal["auto", "module", "graph", "masked"]


@dataclass(frozen=True, eq=False)
class Task:
    """What one call of `prune` works with.

    Attributes:
        model: The dense model.
        data: All calibration data.
        limits: What must stay.
        repair: As for `sc.repair`.
        form: As for `sc.apply`.
        on_unrealisable: As for `sc.apply`.
        allow_inexact: As for `sc.trace`.
        steps: Number of rounds.
        loss_fn: As for `sc.score`.
        metric: As for `sc.prune`.
        seed: Seed for all random choices.
        progress: Show bars on a terminal.
        fit: The part of the data that scores and repairs read.
        held: The part that is held out.
        example: The first batch.
        seconds: How long each phase took so far.
    """

    model: nn.Module
    data: Calibration
    limits: Limits | None = None
    repair: Methods = "auto"
    form: Form = "auto"
    on_unrealisable: Literal["graph", "leave"] = "leave"
    allow_inexact: bool = False
    steps: int = 1
    loss_fn: LossFn | None = None
    metric: Metric | None = None
    seed: int = 0
    progress: bool = False
    fit: Calibration = field(init=False)
    held: Calibration = field(init=False)
    example: Batch = field(init=False)
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Splits the data and reads the first batch."""
        fit, held = self.data.split()
        for name, value in (("fit", fit), ("held", held), ("example", self.data.first())):
            object.__setattr__(self, name, value)


@dataclass(frozen=True, eq=False)
class Scored:
    """Scores, and the signals that could not be measured.

    Attributes:
        scores: Of every signal that the data could feed.
        missing: For each other signal, why not.
    """

    scores: Scores
    missing: Mapping[str, str] = field(default_factory=dict)


class Target(ABC):
    """One granularity: how it is traced, scored, allocated, applied, proven and repaired.

    Attributes:
        forms: The forms that a result may have.
        default: The allocator that None stands for.
        candidates: What ``auto`` compares: name -> makes the rule.
        compared: The rules that `compare` takes if none are given.
        budgets: The budgets that it takes if none are given.
        refused: Options of `prune` that mean nothing here, with the reason.
        task: The call that this target serves.
        graph: The trace.
    """

    forms: ClassVar[tuple[str, ...]]
    default: ClassVar[str]
    candidates: ClassVar[Mapping[str, Callable[[], Any]]]
    compared: ClassVar[tuple[str, ...]]
    budgets: ClassVar[tuple[Budget, ...]]
    refused: ClassVar[Mapping[str, str]] = {}

    def __init__(self, task: Task, graph: Any = None) -> None:
        """Traces the model, unless its graph is at hand."""
        self.task = task
        with clock(task.seconds, "trace"):
            self.graph = self.trace(task.model) if graph is None else graph

    @staticmethod
    @abstractmethod
    def rule(allocator: Any) -> Any:
        """The rule of this name, or the one that was passed; refuses what cannot decide here."""

    @staticmethod
    @abstractmethod
    def check_repair(repair: Methods) -> None:
        """Refuses repairs that are unknown here."""

    @abstractmethod
    def trace(self, model: nn.Module) -> Any:
        """What may be removed of a model: groups, and what they cost."""

    @property
    def prunable(self) -> Any:
        """The graph that signals and rules read: the trace."""
        return self.graph

    def score(self, rules: Iterable[Allocates]) -> Scores:
        """The scores of all signals that the rules read, in one pass over the data."""
        return self.score_signals([signal for rule in rules for signal in rule.signals])

    def score_signals(self, signals: Sequence[Any]) -> Scores:
        """The scores of these signals."""
        task = self.task
        options: dict[str, Any] = {"loss_fn": task.loss_fn, "seed": task.seed, "progress": task.progress}
        return scored_once(self.prunable, task.model, task.fit, signals, **options)

    def scored(self, rules: Iterable[Allocates]) -> Scored:
        """The same for candidates: a signal that the data cannot feed is listed instead of an error."""
        return Scored(self.score(rules))

    def scored_as_labels_allow(
        self, rules: Iterable[Allocates], known: Mapping[str, type[Any]], base: type[Any]
    ) -> Scored:
        """The same, where signals that need gradients are the ones that need a loss.

        Args:
            rules: The rules.
            known: The signals of this granularity, by name.
            base: Their class.
        """
        wanted = {name_of(signal): signal for rule in rules for signal in rule.signals}
        unlabelled = self.task.loss_fn is None and self.task.fit.first().labels is None
        missing = {
            name: f"signal {name}: expected labels or loss_fn, got neither."
            for name, signal in wanted.items()
            if unlabelled
            and any("gradients" in leaf.needs for leaf in leaves([signal], known, base).values())
        }
        signals = [signal for name, signal in wanted.items() if name not in missing]
        empty = Scores({}, fingerprint=self.graph.fingerprint)
        return Scored(self.score_signals(signals) if signals else empty, missing)

    @staticmethod
    def with_curves(rule: Any, graph: Any, data: Any, scores: Scores, *, progress: bool = False) -> Any:
        """The rule with what it has to measure on data itself."""
        return rule

    def measured(self, rule: Any, data: Calibration, scores: Scores) -> Any:
        """The rule with what it has to measure on these data."""
        return self.with_curves(rule, self.prunable, data, scores, progress=self.task.progress)

    def allocate(self, rule: Any, scores: Scores, budget: Budget | None, limits: Limits | None = None) -> Any:
        """The rule's plan within these limits, or those of the call."""
        return rule.allocate(self.prunable, scores, budget, limits or self.task.limits, self.task.seed)

    @abstractmethod
    def default_budget(self, scored: Scored) -> Budget:
        """What candidates are held to where no budget was given."""

    def same(self, one: Any, other: Any) -> bool:
        """Whether two plans remove the same."""
        return bool(one.groups == other.groups)

    @abstractmethod
    def candidate(self, plan: Any, data: Calibration) -> nn.Module:
        """A model to judge the plan by, repaired on these data by `candidate_repair`."""

    def judge(self) -> Judge:
        """What measures candidates: the distance to the dense outputs, or the task's loss."""
        return Judge(self.task.model, self.task.held, self.task.loss_fn)

    @property
    @abstractmethod
    def candidate_repair(self) -> str:
        """What repairs candidates; empty for nothing."""

    def decide(
        self, rule: Any, scores: Scores, budget: Budget | None, limits: Limits | None
    ) -> tuple[Any, str]:
        """The plan, in as many rounds as the task says; and what these left whole."""
        steps = self.task.steps
        if steps == 1 or budget is None:
            return self.allocate(rule, scores, budget, limits), ""
        part = budget_after(1, steps, budget, self.graph)

        def first(within: Limits | None) -> Plan:
            plan: Plan = self.allocate(rule, scores, part, within)
            return plan

        return plan_in_steps(self, rule, first, budget, limits)

    def intermediate(self, plan: Plan) -> nn.Module:
        """The model between two rounds, before its repair."""
        return self.apply(plan)

    def between(self, small: nn.Module) -> nn.Module:
        """The model between two rounds, repaired by what does not train; with `reconstruct` for ``auto``."""
        task = self.task
        return repair_model(
            small,
            task.model,
            task.fit,
            "reconstruct" if task.repair == "auto" else quick(task.repair),
            graph=self.graph,
            loss_fn=task.loss_fn,
            seed=task.seed,
            progress=False,
        )

    def budget_of(self, graph: Any, so_far: Plan, budget: Budget) -> Budget:
        """The budget of a later round, as the costs of that round's graph count it."""
        return budget

    def limits_of(self, graph: Any, so_far: Plan, limits: Limits | None) -> Limits | None:
        """The limits of a later round, by the names that things have in its graph."""
        return limits

    def apart(self, groups: Iterable[Any], so_far: Plan) -> tuple[str, ...]:
        """Groups of a later round that no plan for the dense model can name."""
        return split(groups, so_far)

    def compose(self, so_far: Plan, later: Plan) -> Plan:
        """One plan for the dense model, of that of the rounds so far and that of the next one."""
        return compose_plans(so_far, later)

    def carry_out(self, rule: Any, scores: Scores, budget: Budget | None) -> tuple[nn.Module, Any]:
        """The pruned model, and its plan."""
        with clock(self.task.seconds, "allocate"):
            plan, _ = self.decide(rule, scores, budget, self.task.limits)
        with clock(self.task.seconds, "apply"):
            return self.apply(plan), plan

    def apply(self, plan: Any) -> nn.Module:
        """The pruned model."""
        return apply(self.task.model, plan, graph=self.graph)

    @abstractmethod
    def verify(self, small: nn.Module, plan: Any) -> Proof:
        """Compares a pruned model with what it has to equal."""

    def own_repairs(self, plan: Any) -> dict[str, Method]:
        """Repairs beside those of `sc.repair`, by name."""
        return {}

    def repaired(self, small: nn.Module, plan: Any) -> nn.Module:
        """The pruned model after the repair that was asked for, as far as it helped: `sc.repair`."""
        task = self.task
        return repair_model(
            small,
            task.model,
            task.data,
            task.repair,
            own=self.own_repairs(plan),
            graph=self.graph,
            loss_fn=task.loss_fn,
            seed=task.seed,
            progress=task.progress,
        )

    def costs(self, plan: Any) -> tuple[Cost, Cost]:
        """What the dense and the pruned model cost."""
        return plan.dense, plan.predicted

    def shares(self, plan: Any) -> tuple[float | None, float]:
        """MACs and parameters of the pruned model, as shares of the dense one; None: MACs do not change."""
        dense, small = self.costs(plan)
        return small.macs / dense.macs, small.params / dense.params

    def facts(self, small: nn.Module, plan: Plan, rule: Any, scores: Scores) -> dict[str, Any]:
        """What the report says of the plan and of what stays as it was."""
        return {
            "layers": layers_of(plan, scores.only(map(name_of, rule.signals))),
            "knob": knob_of(plan),
            "untouched": untouched(self.graph),
            "attributes": {**record_of(small).sizes, **record_of(small).numbers},
        }


def rule_named(allocator: Any, rules: Mapping[str, Any], example: str, choosers: str = "") -> Any:
    """The rule of this name, or the rule itself.

    Args:
        allocator: What the user passed.
        rules: What names stand for.
        example: A rule as the user would write it, for the message.
        choosers: Further names that the message gives.

    Raises:
        SettingError: It is neither a known name nor a rule.
    """
    if isinstance(allocator, str) and allocator in rules:
        return rules[allocator]
    if isinstance(allocator, Allocator):
        return allocator
    raise SettingError(
        f"allocator: expected one of {choosers}{', '.join(rules)} or an Allocator, got {allocator!r}. "
        f"Write {example}, for example."
    )
