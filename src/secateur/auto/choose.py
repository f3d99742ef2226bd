"""A choice among rules by what is left of the model after removal and repair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from torch import nn

from secateur.allocate import Budget, Limits, ToD
from secateur.allocate.registry import Allocates
from secateur.allocate.unit_distortions import with_unit_curves
from secateur.apply.apply import apply
from secateur.auto.auto import Auto
from secateur.auto.contest import Candidate, Contest, Round
from secateur.auto.outcome import Choice
from secateur.auto.race import Heat, Runner, race
from secateur.auto.scored import Scored, scored
from secateur.calibration import Calibration, seeded
from secateur.calibration.thinning import thinned
from secateur.errors import (
    BudgetError,
    NothingToPruneError,
    SecateurError,
    UnreachableBudgetError,
)
from secateur.graph.graph import Graph
from secateur.plan import Plan
from secateur.progress import steps
from secateur.repair.judging import Judge
from secateur.repair.repair import Repair, Work, resolve
from secateur.score import Scores
from secateur.score.combination import name_of
from secateur.score.loss import LossFn

FEW, MORE = 1 / 16, 1 / 4
"""Shares of the data that repairs work on in the first rounds, and in the last."""

MARGIN = 3.0
"""See `Heat`."""

LEAST = 64
"""No fewer samples than this, where there are as many."""


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

    The first round only re-estimates batch norms, which costs little, and halves the field; later ones repair
    in earnest, on more and more of the data.

    All candidates are held to the same budget. Without one, the cost that ``tod`` with its default tolerance
    decides on is the budget of all. Repairs in earnest are those asked for; for ``auto`` it is
    ``reconstruct``. Equal plans run once. What judges is the distance to the dense model's outputs, or
    `loss_fn`, on `held`.

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
    total = sum(batch.size for batch in fit)
    whole = graph.static_batch is not None
    few = thinned(fit, max(FEW, LEAST / total), whole=whole)
    more = few if LEAST >= MORE * total else thinned(fit, MORE, whole=whole)
    agreed = budget if budget is not None else _by_tolerance(graph, scores, known.missing, limits, seed)
    field = _Field.of(auto, graph, known, few, agreed, limits, seed, progress=progress)
    rounds = _rounds(repair, few, more, auto.finalists, len(field.plans))
    judge = Judge(model, held, loss_fn)

    def run(name: str, number: int) -> NDArray[np.float64] | str:
        step(f"{name}, round {number + 1}")
        methods, data, _ = rounds[number]
        try:
            small = apply(model, field.plans[name], "graph", graph=graph)
            for method in methods:
                method.run(small, Work(lambda: graph, data))
            return judge(small)
        except SecateurError as error:
            return f"did not run: {error}"

    with seeded(seed), steps(None, progress) as step:
        order = race(list(field.plans), run, [heat for _, _, heat in rounds])
    if order[0].out:
        raise NothingToPruneError(f"auto: expected a candidate that can run, got none: {order[0].out}.")
    winner = order[0].name
    return Choice(
        field.rules[winner],
        agreed,
        scores,
        Contest(
            measure=judge.measure,
            rounds=tuple(
                Round(
                    repair=" + ".join(method.name for method in methods),
                    samples=sum(batch.size for batch in data) if methods else 0,
                )
                for methods, data, _ in rounds[: len(order[0].errors)]
            ),
            held=judge.samples,
            candidates=(*(_ran(runner, field.plans[runner.name]) for runner in order), *field.others),
        ),
    )


@dataclass(frozen=True)
class _Field:
    """Who takes part.

    Attributes:
        plans: Of each candidate that runs.
        rules: The same candidates, with what they have measured.
        others: The candidates that do not run, with the reason.
    """

    plans: dict[str, Plan]
    rules: dict[str, Allocates]
    others: list[Candidate]

    @classmethod
    def of(
        cls,
        auto: Auto,
        graph: Graph,
        known: Scored,
        data: Calibration,
        budget: Budget,
        limits: Limits | None,
        seed: int,
        *,
        progress: bool,
    ) -> _Field:
        """Let every candidate plan.

        Raises:
            NothingToPruneError: No candidate can run; the message says why each cannot.
            UnreachableBudgetError: None reaches the budget.
        """
        field = cls({}, {}, [])
        unreached: list[UnreachableBudgetError] = []
        if budget.latency is not None:
            budget = replace(budget, latency=None, macs=budget.macs or budget.latency)
        for name, rule in auto.rules.items():
            lacking = [known.missing[name_of(s)] for s in rule.signals if name_of(s) in known.missing]
            if lacking:
                field.others.append(_absent(name, lacking[0]))
                continue
            try:
                curved = with_unit_curves(rule, graph, data, known.scores, progress=progress)
                plan = curved.allocate(graph, known.scores, budget, limits, seed)
            except SecateurError as error:
                if isinstance(error, UnreachableBudgetError):
                    unreached.append(error)
                field.others.append(_absent(name, str(error)))
                continue
            twin = next((other for other, made in field.plans.items() if made.groups == plan.groups), None)
            if twin is not None:
                field.others.append(_ran(Runner(name, out=f"the same plan as {twin}"), plan))
                continue
            field.plans[name], field.rules[name] = plan, curved
        if field.plans:
            return field
        if unreached:
            raise min(unreached, key=lambda error: error.smallest)
        why = "; ".join(f"{entry.name} {entry.verdict}" for entry in field.others)
        raise NothingToPruneError(f"auto: expected a candidate that can run, got none: {why}")


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


def _ran(runner: Runner, plan: Plan) -> Candidate:
    return Candidate(
        name=runner.name,
        macs=plan.predicted.macs / plan.dense.macs,
        params=plan.predicted.params / plan.dense.params,
        errors=tuple(runner.errors),
        verdict=runner.out or "chosen",
    )


def _absent(name: str, why: str) -> Candidate:
    return Candidate(name=name, macs=None, params=None, errors=(), verdict=f"did not run: {why}")


def _rounds(
    repair: str | Sequence[str] | None, few: Calibration, more: Calibration, finalists: int, count: int
) -> list[tuple[tuple[Repair, ...], Calibration, Heat]]:
    """What repairs each round, on what, and what it decides: first what costs little, last what counts."""
    asked = () if repair is None else resolve("reconstruct" if repair == "auto" else repair)[0]
    if not asked:
        return [((), few, Heat(1, None))]
    rounds = [(asked, more, Heat(1, None))]
    if few is not more:
        rounds.insert(0, (asked, few, Heat(finalists, MARGIN)))
    cheap = resolve("batchnorm")[0]
    if asked != cheap:
        rounds.insert(0, (cheap, few, Heat(max(finalists, -(-count // 2)), None)))
    return rounds
