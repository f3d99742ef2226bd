"""Choose among allocators: all plan for the same budget, and their repaired models are measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from secateur.allocators import Budget
from secateur.calibration import Calibration, seeded
from secateur.calibration.subset import take_share
from secateur.common.progress import steps
from secateur.errors import BudgetError, NothingToPruneError, SecateurError, UnreachableBudgetError
from secateur.pipeline.auto.chooser import Choice
from secateur.pipeline.auto.rounds import CandidateResult, Stage, run_rounds
from secateur.pipeline.auto.selection import Candidate, Round, Selection
from secateur.pipeline.targets.target import Scored, Target
from secateur.repairs.judging import MARGIN, Judge
from secateur.repairs.resuming import described
from secateur.signals.distributed import OF_THE_RUN
from secateur.signals.journal import current_journal, plan_digest
from secateur.signals.units.combination import name_of

FEW, MORE = 1 / 16, 1 / 4
"""Shares of the data that repairs use in the first round and in the last round."""

LEAST = 64
"""Least number of samples that repairs use, if there are that many."""


@dataclass(frozen=True)
class Planned:
    """The plan of one candidate.

    Attributes:
        rule: The candidate, with the curves it measured.
        plan: Its plan.
        macs: MACs of the planned model over those of the dense model; None if the target removes no MACs.
        params: Parameters of the planned model over those of the dense model.
    """

    rule: Any
    plan: Any
    macs: float | None
    params: float


def choose(
    rules: Mapping[str, Any],
    finalists: int,
    target: Target,
    budget: Budget | None = None,
    known: Scored | None = None,
) -> Choice:
    """Score once, let every candidate plan, and measure the plans in at most two rounds.

    In the first round all candidates are repaired on a few samples. In the second round the best of them are
    repaired on more samples (see `Target.candidate`). Equal plans are measured once. The error is measured on
    held-out data: the distance to the dense model's outputs, or the task's `loss_fn`.

    Args:
        rules: The candidates, by name.
        finalists: Largest number of candidates in the second round.
        target: The target, with the model and the data.
        budget: The budget of all candidates. None: `Target.default_budget`.
        known: Earlier result of `Target.score_candidates`. With it, nothing is scored again.

    Raises:
        NothingToPruneError: No candidate could run. The message gives the reason for each.
        UnreachableBudgetError: No candidate reaches the budget.
        BudgetError: `budget` is no `Budget`; or it is None, and there are no data for a default.
    """
    task = target.task
    if known is None:
        known = target.score_candidates(rules.values())
    agreed = target.default_budget(known) if budget is None else checked("auto", budget)
    few, more = _parts(task.fit, whole=fixed(target))
    planned, others = plans(rules, target, known, agreed, few)
    repair, judge = target.candidate_repair, target.judge()
    rounds = [(few, Stage(finalists, MARGIN)), (more, Stage(1, None))]
    if not repair or few is more:
        rounds = [(few, Stage(1, None))]

    def run(name: str, number: int) -> NDArray[np.float64] | str:
        step(f"{name}, round {number + 1}")
        return measured(target, judge, planned[name].plan, rounds[number][0])

    with seeded(task.seed), steps(None, task.progress) as step:
        order = run_rounds(list(planned), run, [stage for _, stage in rounds])
    selection = selected(order, planned, others, target, judge, [data for data, _ in rounds])
    return Choice(planned[order[0].name].rule, agreed, known.scores, selection)


def checked(name: str, budget: object) -> Budget:
    """Return `budget` if it is a `Budget`.

    Raises:
        BudgetError: It is something else.
    """
    if isinstance(budget, Budget):
        return budget
    raise BudgetError(
        f"{name}: expected budget to be a Budget or None, got {budget!r}. "
        "Write Budget(macs=0.5), for example."
    )


def fixed(target: Target) -> bool:
    """Whether the batch size is fixed, so that batches must stay whole."""
    return getattr(target.graph, "static_batch", None) is not None


def measured(target: Target, judge: Judge, plan: Any, data: Calibration) -> NDArray[np.float64] | str:
    """Prune, repair and measure a model; or read the result from the journal.

    Args:
        target: The target, with the model.
        judge: Measures the pruned model.
        plan: The plan.
        data: The data that the repair reads.

    Returns:
        The errors [samples]; or, as text, the reason why there are none.
    """
    journal = current_journal()
    if journal is None:
        return _measured(target, judge, plan, data)
    parts = (plan_digest(plan), target.candidate_repair, journal.data(data), described(judge, journal))
    step = journal.step("candidate", *parts)
    known = step.load(partial(_from_journal, judge))
    if known is not None:
        return known
    with step.inside():
        found = _measured(target, judge, plan, data)
    if isinstance(found, str):
        step.save(found)
    else:
        step.save("", {"errors": torch.from_numpy(found)})
    return found


def _from_journal(judge: Judge, why: Any, tensors: Mapping[str, Tensor]) -> NDArray[np.float64] | str:
    """Return what `measured` saved, the errors or the reason; ValueError if it is damaged."""
    if not isinstance(why, str):
        raise ValueError(f"a reason that is no text but {type(why).__name__}")
    return why or judge.fitting(tensors["errors"])


def _measured(target: Target, judge: Judge, plan: Any, data: Calibration) -> NDArray[np.float64] | str:
    try:
        return judge(target.candidate(plan, data))
    except OF_THE_RUN:
        raise
    except SecateurError as error:
        return f"did not run: {error}"


def selected(
    order: Sequence[CandidateResult],
    planned: Mapping[str, Planned],
    others: Sequence[Candidate],
    target: Target,
    judge: Judge,
    rounds: Sequence[Calibration],
) -> Selection:
    """Return the record of a choice.

    Args:
        order: Result of `run_rounds`.
        planned: The plans, by candidate.
        others: Candidates that were not measured.
        target: The target.
        judge: Measured the candidates.
        rounds: The data that repairs read in each round.

    Raises:
        NothingToPruneError: No candidate could run.
    """
    if order[0].out:
        raise NothingToPruneError(f"auto: expected a candidate that can run, got none: {order[0].out}.")
    repair = target.candidate_repair
    return Selection(
        measure=judge.measure,
        rounds=tuple(
            Round(repair=repair, samples=data.samples() if repair else 0)
            for data in rounds[: len(order[0].errors)]
        ),
        held=judge.samples,
        candidates=(*(_record(candidate, planned[candidate.name]) for candidate in order), *others),
    )


def plans(
    rules: Mapping[str, Any], target: Target, known: Scored, budget: Budget, few: Calibration
) -> tuple[dict[str, Planned], list[Candidate]]:
    """Let each candidate plan.

    Returns:
        The plans to measure, by candidate; and the candidates that are not measured, with the reason.
    """
    budget.targets(target.prunable.cost())  # raises for a bound that this granularity does not count
    planned: dict[str, Planned] = {}
    others: list[Candidate] = []
    unreached: list[UnreachableBudgetError] = []
    for name, rule in rules.items():
        lacking = [known.missing[name_of(s)] for s in rule.signals if name_of(s) in known.missing]
        if lacking:
            others.append(_not_run(name, lacking[0]))
            continue
        try:
            curved = target.with_measurements(rule, few, known.scores)
            plan = target.allocate(curved, known.scores, budget)
        except OF_THE_RUN:
            raise
        except SecateurError as error:
            if isinstance(error, UnreachableBudgetError):
                unreached.append(error)
            others.append(_not_run(name, str(error)))
            continue
        found = Planned(curved, plan, *target.shares(plan))
        equal = next((n for n, other in planned.items() if target.same(other.plan, plan)), None)
        if equal is None:
            planned[name] = found
        else:
            others.append(_record(CandidateResult(name, out=f"the same plan as {equal}"), found))
    if planned:
        return planned, others
    if unreached:
        raise min(unreached, key=lambda error: error.smallest)
    why = "; ".join(f"{entry.name} {entry.verdict}".rstrip(".") for entry in others)
    raise NothingToPruneError(f"auto: expected a candidate that can run, got none: {why}.")


def _parts(data: Calibration, *, whole: bool) -> tuple[Calibration, Calibration]:
    """The data of the first round and of the last round. They are the same object if there are few samples.

    Args:
        data: All data that repairs may use.
        whole: True: batches cannot be cut.
    """
    total = data.samples()
    few = take_share(data, max(FEW, LEAST / total), whole=whole)
    return few, (few if LEAST >= MORE * total else take_share(data, MORE, whole=whole))


def _record(candidate: CandidateResult, found: Planned) -> Candidate:
    return Candidate(
        name=candidate.name,
        macs=found.macs,
        params=found.params,
        errors=tuple(candidate.errors),
        verdict=candidate.out or "chosen",
    )


def _not_run(name: str, why: str) -> Candidate:
    return Candidate(name=name, macs=None, params=None, errors=(), verdict=f"did not run: {why}")
