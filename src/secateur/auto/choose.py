"""A choice among rules for units, by what is left of the model after removal and repair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

from torch import nn

from secateur.allocate import Budget, Limits, ToD
from secateur.allocate.registry import Allocates
from secateur.allocate.unit_distortions import with_unit_curves
from secateur.apply.apply import apply
from secateur.auto.auto import Auto
from secateur.auto.contending import Field, Planned, Way, contend, parts
from secateur.auto.outcome import Choice
from secateur.auto.scored import Scored, scored
from secateur.calibration import Calibration
from secateur.errors import ApplyError, BudgetError
from secateur.graph.graph import Graph
from secateur.plan import Plan
from secateur.repair.judging import Judge
from secateur.repair.methods import Work, resolve
from secateur.score import Scores
from secateur.score.combination import name_of
from secateur.score.loss import LossFn


def choose(
    auto: Auto,
    model: nn.Module,
    graph: Graph,
    fit: Calibration,
    held: Calibration,
    budget: Budget | None = None,
    limits: Limits | None = None,
    *,
    repair: str | Sequence[str] | None = "auto",
    known: Scored | None = None,
    loss_fn: LossFn | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Choice:
    """Score once, let every candidate plan, and race their plans: apply, repair, judge, and drop the worse.

    All candidates are repaired on a few samples, and those that may still win on more. The repair is what was
    asked for; for ``auto`` it is ``reconstruct``. Equal plans run once. What judges is the distance to the
    dense model's outputs, or `loss_fn`, on `held`.

    All are held to the same budget. Without one, the cost that ``tod`` with its default tolerance decides on
    is the budget of all.

    Args:
        auto: The candidates.
        model: The dense model; it is left as it was.
        graph: Its trace.
        fit: Data to score and repair on.
        held: Data to judge on.
        budget: What each may cost. A bound on latency counts as one on MACs here.
        limits: What must stay.
        repair: As for `sc.repair`.
        known: What `scored` gave, to choose again for another budget.
        loss_fn: As for `sc.score`.
        seed: Of everything that draws.
        progress: Show bars on a terminal.

    Raises:
        NothingToPruneError: No candidate could run; the message says why each could not.
        UnreachableBudgetError: None reaches the budget.
        BudgetError: There is no budget, and no labels for ``tod`` to do without one.
    """
    if budget is not None and not isinstance(budget, Budget):
        raise BudgetError(
            f"auto: expected budget to be a Budget or None, got {budget!r}. "
            "Write Budget(macs=0.5), for example."
        )
    if known is None:
        known = scored(auto, graph, fit, loss_fn=loss_fn, seed=seed, progress=progress)
    scores = known.scores
    few, more = parts(fit, whole=graph.static_batch is not None)
    agreed = budget if budget is not None else _by_tolerance(graph, scores, known.missing, limits, seed)
    held_to = agreed
    if agreed.latency is not None:
        held_to = replace(agreed, latency=None, macs=agreed.macs or agreed.latency)

    def decide(rule: Allocates) -> Planned:
        curved = with_unit_curves(rule, graph, few, scores, progress=progress)
        plan = curved.allocate(graph, scores, held_to, limits, seed)
        return Planned.of(curved, plan)

    methods = next(iter(resolve("reconstruct" if repair == "auto" else repair)), ())

    varied = any(not graph.programs.begins_with(b.args, b.kwargs) for part in (fit, held) for b in part)

    def make(plan: Plan, data: Calibration) -> nn.Module:
        # The program is the fastest to make, but takes the traced sizes alone.
        exact = all(group.exact for group in plan.groups)
        form: Literal["masked", "module"] = "masked" if exact else "module"
        try:
            small = apply(model, plan, form if varied else "graph", graph=graph)
        except ApplyError:  # there are models that no program can hold
            small = apply(model, plan, form, graph=graph)
        for method in methods:
            method.run(small, Work(lambda: graph, data))
        return small

    field = Field.of(auto.rules, known.missing, decide, lambda one, other: one.groups == other.groups)
    way = Way(" + ".join(method.name for method in methods), make)
    judge = Judge(model, held, loss_fn)
    winner, contest = contend(field, way, few, more, auto.finalists, judge, seed=seed, progress=progress)
    return Choice(field.planned[winner].rule, agreed, scores, contest)


def _by_tolerance(
    graph: Graph, scores: Scores, missing: Mapping[str, str], limits: Limits | None, seed: int
) -> Budget:
    """What ``tod`` with its default tolerance makes of the model."""
    rule = ToD()
    lacking = [missing[name_of(s)] for s in rule.signals if name_of(s) in missing]
    if lacking or any(name_of(s) not in scores for s in rule.signals):
        why = lacking[0] if lacking else "no candidate asks for its signals"
        raise BudgetError(
            f"auto: expected a budget, or what tod needs to decide on one, got neither: {why} "
            "Do give a budget."
        )
    return Budget(macs=rule.allocate(graph, scores, None, limits, seed).predicted.macs)
