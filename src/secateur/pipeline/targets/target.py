"""The interface of a pruning target: what `prune`, `choose` and `compare` call for every granularity."""

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
    """The model, data and options of one call of `prune`.

    Attributes:
        model: The dense model.
        data: All calibration data.
        limits: Limits on what may be removed.
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
        seconds: Seconds that each phase took so far, by its name.
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
        """Split the data and read the first batch."""
        fit, held = self.data.split()
        for name, value in (("fit", fit), ("held", held), ("example", self.data.first())):
            object.__setattr__(self, name, value)


@dataclass(frozen=True, eq=False)
class Scored:
    """Scores, and the signals that these data cannot provide.

    Attributes:
        scores: The scores of all other signals.
        missing: For each missing signal, the reason.
    """

    scores: Scores
    missing: Mapping[str, str] = field(default_factory=dict)


class Target(ABC):
    """One granularity: how it is traced, scored, allocated, applied, proven and repaired.

    Attributes:
        forms: The forms that a result may have.
        default: Name of the default allocator.
        candidates: The rules that ``auto`` compares: name -> function that makes the rule.
        compared: The default rules of `compare`.
        budgets: The default budgets of `compare`.
        refused: Options of `prune` that this target does not support, with the reason.
        task: The call of `prune` that this target is for.
        graph: The trace of the dense model.
    """

    forms: ClassVar[tuple[str, ...]]
    default: ClassVar[str]
    candidates: ClassVar[Mapping[str, Callable[[], Any]]]
    compared: ClassVar[tuple[str, ...]]
    budgets: ClassVar[tuple[Budget, ...]]
    refused: ClassVar[Mapping[str, str]] = {}

    def __init__(self, task: Task, graph: Any = None) -> None:
        """Trace the model, unless a graph is given."""
        self.task = task
        with clock(task.seconds, "trace"):
            self.graph = self.trace(task.model) if graph is None else graph

    @staticmethod
    @abstractmethod
    def rule(allocator: Any) -> Any:
        """Return the rule with this name, or the rule itself. SettingError if it cannot be used here."""

    @staticmethod
    @abstractmethod
    def check_repair(repair: Methods) -> None:
        """Raise SettingError if this target does not have one of these repairs."""

    @abstractmethod
    def trace(self, model: nn.Module) -> Any:
        """Trace a model: find the groups that may be pruned, and their costs."""

    @property
    def prunable(self) -> Any:
        """The graph that signals and rules read."""
        return self.graph

    def score(self, rules: Iterable[Allocates]) -> Scores:
        """Score all signals that the rules read, in one pass over the data."""
        return self.score_signals([signal for rule in rules for signal in rule.signals])

    def score_signals(self, signals: Sequence[Any]) -> Scores:
        """Score these signals."""
        task = self.task
        options: dict[str, Any] = {"loss_fn": task.loss_fn, "seed": task.seed, "progress": task.progress}
        return scored_once(self.prunable, task.model, task.fit, signals, **options)

    def score_candidates(self, rules: Iterable[Allocates]) -> Scored:
        """Score for candidates. A signal that the data cannot provide is listed, and raises no error."""
        return Scored(self.score(rules))

    def score_as_labels_allow(
        self, rules: Iterable[Allocates], known: Mapping[str, type[Any]], base: type[Any]
    ) -> Scored:
        """Like `score_candidates`, but a signal that needs gradients is missing without labels or `loss_fn`.

        Args:
            rules: The candidates.
            known: The signals of this granularity, by name.
            base: The base class of these signals.
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
        """Return the rule with the distortion curves that it measures on data, if it needs some."""
        return rule

    def with_measurements(self, rule: Any, data: Calibration, scores: Scores) -> Any:
        """Return the rule with everything that it measures on data, if it needs something."""
        return self.with_curves(rule, self.prunable, data, scores, progress=self.task.progress)

    def allocate(self, rule: Any, scores: Scores, budget: Budget | None, limits: Limits | None = None) -> Any:
        """Make the rule's plan, within these limits. None: the limits of the call."""
        return rule.allocate(self.prunable, scores, budget, limits or self.task.limits, self.task.seed)

    @abstractmethod
    def default_budget(self, scored: Scored) -> Budget:
        """The budget of all candidates if the user gives none."""

    def same(self, one: Any, other: Any) -> bool:
        """Whether two plans remove the same units."""
        return bool(one.groups == other.groups)

    @abstractmethod
    def candidate(self, plan: Any, data: Calibration) -> nn.Module:
        """Apply a plan and repair the result on these data with `candidate_repair`, to measure the plan."""

    def judge(self) -> Judge:
        """Return what measures candidates: by the distance to the dense outputs, or by `loss_fn`."""
        return Judge(self.task.model, self.task.held, self.task.loss_fn)

    @property
    @abstractmethod
    def candidate_repair(self) -> str:
        """Names of the repairs that candidates get; empty if none."""

    def decide(
        self, rule: Any, scores: Scores, budget: Budget | None, limits: Limits | None
    ) -> tuple[Any, str]:
        """Make the plan in `steps` rounds. Also return a note on groups that the rounds could not prune."""
        steps = self.task.steps
        if steps == 1 or budget is None:
            return self.allocate(rule, scores, budget, limits), ""
        part = budget_after(1, steps, budget, self.graph)

        def first(within: Limits | None) -> Plan:
            plan: Plan = self.allocate(rule, scores, part, within)
            return plan

        return plan_in_steps(self, rule, first, budget, limits)

    def apply_between_rounds(self, plan: Plan) -> nn.Module:
        """Apply a plan between two rounds, without a repair."""
        return self.apply(plan)

    def repair_between_rounds(self, small: nn.Module) -> nn.Module:
        """Repair a model between two rounds, without training: ``auto`` stands for ``reconstruct``."""
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

    def budget_in_round(self, graph: Any, so_far: Plan, budget: Budget) -> Budget:
        """Convert a budget to the costs of a later round's graph."""
        return budget

    def limits_in_round(self, graph: Any, so_far: Plan, limits: Limits | None) -> Limits | None:
        """Convert limits to the names in a later round's graph."""
        return limits

    def unmatched_groups(self, groups: Iterable[Any], so_far: Plan) -> tuple[str, ...]:
        """Names of the groups of a later round that correspond to no single group of the dense model."""
        return split(groups, so_far)

    def compose(self, so_far: Plan, later: Plan) -> Plan:
        """Combine the plans of the rounds so far and of the next one to one plan for the dense model."""
        return compose_plans(so_far, later)

    def plan_and_apply(self, rule: Any, scores: Scores, budget: Budget | None) -> tuple[nn.Module, Any]:
        """Make a plan and apply it."""
        with clock(self.task.seconds, "allocate"):
            plan, _ = self.decide(rule, scores, budget, self.task.limits)
        with clock(self.task.seconds, "apply"):
            return self.apply(plan), plan

    def apply(self, plan: Any) -> nn.Module:
        """Apply a plan: return the pruned model."""
        return apply(self.task.model, plan, graph=self.graph)

    @abstractmethod
    def verify(self, small: nn.Module, plan: Any) -> Proof:
        """Compare a pruned model with its reference, such as the masked dense model."""

    def own_repairs(self, plan: Any) -> dict[str, Method]:
        """Repairs that only this target has, by name."""
        return {}

    def repaired(self, small: nn.Module, plan: Any) -> nn.Module:
        """Run the requested repair, and keep what lowers the error; see `sc.repair`."""
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
        """Costs of the dense and of the pruned model."""
        return plan.dense, plan.predicted

    def shares(self, plan: Any) -> tuple[float | None, float]:
        """MACs and parameters of the pruned model as shares of the dense ones; None if MACs do not change."""
        dense, small = self.costs(plan)
        return small.macs / dense.macs, small.params / dense.params

    def facts(self, small: nn.Module, plan: Plan, rule: Any, scores: Scores) -> dict[str, Any]:
        """Data for the report: the layers, the cost curve, and what stayed unpruned."""
        return {
            "layers": layers_of(plan, scores.only(map(name_of, rule.signals))),
            "knob": knob_of(plan),
            "untouched": untouched(self.graph),
            "attributes": {**record_of(small).sizes, **record_of(small).numbers},
        }


def rule_named(allocator: Any, rules: Mapping[str, Any], example: str, choosers: str = "") -> Any:
    """Return the rule with this name, or the rule itself.

    Args:
        allocator: The name or rule that the user passed.
        rules: The known rules, by name.
        example: Code that makes a rule, for the error message.
        choosers: Further known names, for the error message. Ends with a comma and a space.

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
