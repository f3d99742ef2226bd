"""A choice among rules for experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from torch import nn

from secateur.allocate import EMP, Budget, Global, Limits, ToD, Uniform
from secateur.allocate.base import Allocator
from secateur.auto.auto import Auto
from secateur.auto.contending import Field, Planned, Way, contend, parts
from secateur.auto.outcome import Choice
from secateur.calibration import Calibration
from secateur.errors import BudgetError
from secateur.experts.allocate import allocate_experts, rule_called
from secateur.experts.apply import apply_experts
from secateur.experts.graph import ExpertGraph
from secateur.experts.repair import METHOD, repair_experts
from secateur.experts.score import leaves, score_experts
from secateur.plan import Plan
from secateur.repair.judging import Judge
from secateur.score.combination import name_of
from secateur.score.loss import LossFn
from secateur.score.scores import Scores

DEFAULT: Mapping[str, Callable[[], Allocator]] = MappingProxyType(
    {
        "tod": lambda: ToD(removal="reap", protection="expert_taylor"),
        "tod, frequency": lambda: ToD(removal="frequency", protection="expert_taylor"),
        "emp, reap": lambda: EMP(removal="reap"),
        "global, reap": lambda: Global(removal="reap"),
        "global, frequency": lambda: Global(removal="frequency"),
        "uniform, reap": lambda: Uniform(removal="reap"),
        "uniform, frequency": lambda: Uniform(removal="frequency"),
        "uniform, output change": lambda: Uniform(removal="output_change"),
    }
)
"""The candidates."""


def choose_experts(
    auto: Auto,
    model: nn.Module,
    graph: ExpertGraph,
    fit: Calibration,
    held: Calibration,
    budget: Budget | None = None,
    limits: Limits | None = None,
    *,
    repair: str | Sequence[str] | None = "auto",
    loss_fn: LossFn | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Choice:
    """As `choose`, for experts.

    Raises:
        NothingToPruneError: No candidate could run; the message says why each could not.
        UnreachableBudgetError: None reaches the budget.
        BudgetError: There is no budget, and no labels for ``tod`` to do without one.
    """
    rules = auto.rules_or(DEFAULT, rule_called)
    wanted = {name_of(signal): signal for rule in rules.values() for signal in rule.signals}
    unlabelled = loss_fn is None and fit.first().labels is None
    missing = {
        name: f"signal {name}: expected labels or loss_fn, got neither."
        for name, signal in wanted.items()
        if unlabelled and any("gradients" in leaf.needs for leaf in leaves([signal]).values())
    }
    signals = [signal for name, signal in wanted.items() if name not in missing]
    scores = (
        score_experts(graph, fit, signals, loss_fn=loss_fn, seed=seed, progress=progress)
        if signals
        else Scores({}, fingerprint=graph.fingerprint)
    )
    agreed = _by_tolerance(graph, scores, limits, seed) if budget is None else budget

    def decide(rule: Allocator) -> Planned:
        plan = allocate_experts(graph, scores, rule, agreed, limits, seed)
        return Planned.of(rule, plan)

    def make(plan: Plan, data: Calibration) -> nn.Module:
        small = apply_experts(model, plan, graph=graph)
        if repair is None:
            return small
        return repair_experts(small, model, data, graph=graph, seed=seed, progress=False)

    few, more = parts(fit)
    field = Field.of(rules, missing, decide, lambda one, other: one.groups == other.groups)
    way = Way("" if repair is None else METHOD, make)
    judge = Judge(model, held, loss_fn)
    winner, contest = contend(field, way, few, more, auto.finalists, judge, seed=seed, progress=progress)
    return Choice(field.planned[winner].rule, agreed, scores, contest)


def _by_tolerance(graph: ExpertGraph, scores: Scores, limits: Limits | None, seed: int) -> Budget:
    """As many experts as ``tod`` with its default tolerance keeps."""
    rule = DEFAULT["tod"]()
    if any(name_of(signal) not in scores for signal in rule.signals):
        raise BudgetError(
            "auto: expected a budget, or labels for tod to decide on one, got neither. Do give a budget: "
            "Budget(experts=0.75), for example."
        )
    groups = allocate_experts(graph, scores, rule, None, limits, seed).groups
    return Budget(experts=sum(g.kept for g in groups) / sum(g.size for g in groups))
