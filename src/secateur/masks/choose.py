"""A choice among rules for single weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import numpy as np
from torch import nn

from secateur.allocate import EMP, ERK, LAMP, Budget, Limits, Repairability, Uniform, resolve
from secateur.allocate.registry import Allocates
from secateur.auto.auto import Auto
from secateur.auto.contending import Field, Planned, Way, contend, parts
from secateur.auto.outcome import Choice
from secateur.calibration import Calibration
from secateur.graph.graph import Graph
from secateur.masks.allocate import allocate
from secateur.masks.apply import apply
from secateur.masks.distortion import with_curves
from secateur.masks.plan import MaskPlan
from secateur.masks.score import asked_of, score
from secateur.masks.weights import Weights
from secateur.repair.judging import Judge
from secateur.repair.methods import Repair, Work
from secateur.repair.methods import resolve as resolve_repairs
from secateur.score.loss import LossFn

DEFAULT: Mapping[str, Callable[[], Allocates]] = MappingProxyType(
    {
        "emp": EMP,
        "emp, wanda": lambda: EMP(removal="wanda"),
        "repairability": Repairability,
        "repairability, wanda": lambda: Repairability(removal="wanda"),
        "erk": ERK,
        "erk, wanda": lambda: ERK(removal="wanda"),
        "lamp": LAMP,
        "uniform, wanda": lambda: Uniform(removal="wanda"),
    }
)
"""The candidates; at a given sparsity EMP is one threshold for all."""


def choose_weights(
    auto: Auto,
    model: nn.Module,
    graph: Graph,
    fit: Calibration,
    held: Calibration,
    budget: Budget | None = None,
    limits: Limits | None = None,
    *,
    repair: str | Sequence[str] | None = "auto",
    own: Callable[[MaskPlan], Mapping[str, Repair]],
    loss_fn: LossFn | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Choice:
    """As `choose`, for single weights. Without a budget, the sparsity that ``emp`` decides on is that of all.

    Args:
        auto: The candidates.
        model: The dense model; it is left as it was.
        graph: Its trace.
        fit: Data to score and repair on.
        held: Data to judge on.
        budget: ``Budget(sparsity=0.9)``.
        limits: What must stay.
        repair: As for `sc.repair`.
        own: Plan -> further repairs by name.
        loss_fn: As for `sc.score`.
        seed: Of everything that draws.
        progress: Show bars on a terminal.

    Raises:
        NothingToPruneError: No candidate could run; the message says why each could not.
        UnreachableBudgetError: None reaches the budget.
    """
    rules = auto.rules_or(DEFAULT, resolve)
    wanted = dict.fromkeys(name for rule in (*rules.values(), EMP()) for name in asked_of(rule))
    scores = score(model, fit, tuple(wanted), loss_fn=loss_fn, seed=seed, progress=progress)
    weights = Weights.of(model)
    agreed = budget
    if agreed is None:
        agreed = Budget(sparsity=allocate(weights, scores, EMP(), None, limits, seed).sparsity)
    few, more = parts(fit, whole=graph.static_batch is not None)
    params = graph.cost().params

    def decide(rule: Allocates) -> Planned:
        curved = with_curves(rule, model, few, scores, progress=progress)
        plan = allocate(weights, scores, curved, agreed, limits, seed)
        return Planned(curved, plan, None, 1 - plan.removed / params)

    names = "reconstruct" if repair == "auto" else repair
    listed = () if names is None else (names,) if isinstance(names, str) else tuple(names)

    def make(plan: MaskPlan, data: Calibration) -> nn.Module:
        small = apply(model, plan, graph)
        for method in next(iter(resolve_repairs(listed, own(plan))), ()):
            method.run(small, Work(lambda: graph, data))
        return small

    field = Field.of(rules, {}, decide, _same)
    way = Way(" + ".join(listed), make)
    judge = Judge(model, held, loss_fn)
    winner, contest = contend(field, way, few, more, auto.finalists, judge, seed=seed, progress=progress)
    return Choice(field.planned[winner].rule, agreed, scores, contest)


def _same(one: MaskPlan, other: MaskPlan) -> bool:
    return all(np.array_equal(mask, other.masks[name]) for name, mask in one.masks.items())
