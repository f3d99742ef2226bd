"""A choice among rules: candidates plan for the same budget, are applied, repaired and measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from secateur.allocate import Budget
from secateur.auto.auto import Auto
from secateur.auto.rounds import Entrant, Stage, run_rounds
from secateur.auto.selection import Candidate, Round, Selection
from secateur.calibration import Calibration, seeded
from secateur.calibration.thinning import thinned
from secateur.errors import BudgetError, NothingToPruneError, SecateurError, UnreachableBudgetError
from secateur.progress import steps
from secateur.repair.judging import MARGIN, Judge
from secateur.score import Scores
from secateur.score.combination import name_of
from secateur.target import Scored, Target

FEW, MORE = 1 / 16, 1 / 4
"""Shares of the data that repairs work on in the first round, and in the last."""

LEAST = 64
"""No fewer samples than this, where there are as many."""


@dataclass(frozen=True, eq=False)
class Choice:
    """What `choose` found.

    Attributes:
        rule: The winner, with what it has measured.
        budget: What all were held to.
        scores: Of all signals that the candidates needed and the data could feed.
        selection: What became of each candidate, the winner first.
    """

    rule: Any
    budget: Budget
    scores: Scores
    selection: Selection


@dataclass(frozen=True)
class _Planned:
    """What a candidate decided.

    Attributes:
        rule: The candidate, with what it has measured.
        plan: Its plan.
        macs: The plan's, as a share of the dense model's; None where that is not what is removed.
        params: Likewise, of the parameters.
    """

    rule: Any
    plan: Any
    macs: float | None
    params: float


def choose(auto: Auto, target: Target, budget: Budget | None = None, known: Scored | None = None) -> Choice:
    """Score once, let every candidate plan, and measure their plans in up to two rounds.

    All candidates are repaired on a few samples, and those that may still win on more (see
    `Target.candidate`). Equal plans run once. The distance to the dense model's outputs judges, or the
    task's `loss_fn`, on held-out data.

    Args:
        auto: The candidates.
        target: What is removed, with the model and the data.
        budget: What each candidate may cost; None: `Target.default_budget` says it.
        known: What `Target.scored` gave, to choose again for another budget.

    Raises:
        NothingToPruneError: No candidate could run; the message says why each could not.
        UnreachableBudgetError: None reaches the budget.
        BudgetError: It is no budget; or there is none, and no data for a default.
    """
    if budget is not None and not isinstance(budget, Budget):
        raise BudgetError(
            f"auto: expected budget to be a Budget or None, got {budget!r}. "
            "Write Budget(macs=0.5), for example."
        )
    rules, task = auto.rules_or(target.candidates, target.rule), target.task
    if known is None:
        known = target.scored(rules.values())
    agreed = target.default_budget(known) if budget is None else budget
    few, more = _parts(task.fit, whole=getattr(target.graph, "static_batch", None) is not None)
    planned, others = _plans(rules, target, known, target.comparable(agreed), few)
    repair, judge = target.candidate_repair, Judge(task.model, task.held, task.loss_fn)
    rounds = [(few, Stage(auto.finalists, MARGIN)), (more, Stage(1, None))]
    if not repair or few is more:
        rounds = [(few, Stage(1, None))]

    def run(name: str, number: int) -> NDArray[np.float64] | str:
        step(f"{name}, round {number + 1}")
        try:
            return judge(target.candidate(planned[name].plan, rounds[number][0]))
        except SecateurError as error:
            return f"did not run: {error}"

    with seeded(task.seed), steps(None, task.progress) as step:
        order = run_rounds(list(planned), run, [stage for _, stage in rounds])
    if order[0].out:
        raise NothingToPruneError(f"auto: expected a candidate that can run, got none: {order[0].out}.")
    selection = Selection(
        measure=judge.measure,
        rounds=tuple(
            Round(repair=repair, samples=sum(batch.size for batch in data) if repair else 0)
            for data, _ in rounds[: len(order[0].errors)]
        ),
        held=judge.samples,
        candidates=(*(_ran(entrant, planned[entrant.name]) for entrant in order), *others),
    )
    return Choice(planned[order[0].name].rule, agreed, known.scores, selection)


def _plans(
    rules: dict[str, Any], target: Target, known: Scored, budget: Budget, few: Calibration
) -> tuple[dict[str, _Planned], list[Candidate]]:
    """What each candidate decided, and the candidates that do not run, with the reason."""
    planned: dict[str, _Planned] = {}
    others: list[Candidate] = []
    unreached: list[UnreachableBudgetError] = []
    for name, rule in rules.items():
        lacking = [known.missing[name_of(s)] for s in rule.signals if name_of(s) in known.missing]
        if lacking:
            others.append(_absent(name, lacking[0]))
            continue
        try:
            measured = target.measured(rule, few, known.scores)
            plan = target.allocate(measured, known.scores, budget)
        except SecateurError as error:
            if isinstance(error, UnreachableBudgetError):
                unreached.append(error)
            others.append(_absent(name, str(error)))
            continue
        found = _Planned(measured, plan, *target.shares(plan))
        equal = next((n for n, other in planned.items() if target.same(other.plan, plan)), None)
        if equal is None:
            planned[name] = found
        else:
            others.append(_ran(Entrant(name, out=f"the same plan as {equal}"), found))
    if planned:
        return planned, others
    if unreached:
        raise min(unreached, key=lambda error: error.smallest)
    why = "; ".join(f"{entry.name} {entry.verdict}".rstrip(".") for entry in others)
    raise NothingToPruneError(f"auto: expected a candidate that can run, got none: {why}.")


def _parts(data: Calibration, *, whole: bool) -> tuple[Calibration, Calibration]:
    """The data of the first round, and of the last; the same where there is little."""
    total = sum(batch.size for batch in data)
    few = thinned(data, max(FEW, LEAST / total), whole=whole)
    return few, (few if LEAST >= MORE * total else thinned(data, MORE, whole=whole))


def _ran(entrant: Entrant, found: _Planned) -> Candidate:
    return Candidate(
        name=entrant.name,
        macs=found.macs,
        params=found.params,
        errors=tuple(entrant.errors),
        verdict=entrant.out or "chosen",
    )


def _absent(name: str, why: str) -> Candidate:
    return Candidate(name=name, macs=None, params=None, errors=(), verdict=f"did not run: {why}")
