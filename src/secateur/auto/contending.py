"""Candidates plan for the same budget, and their plans race: apply, repair, judge, drop the worse."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from secateur.auto.contest import Candidate, Contest, Round
from secateur.auto.race import Heat, Runner, race
from secateur.calibration import Calibration, seeded
from secateur.calibration.thinning import thinned
from secateur.errors import NothingToPruneError, SecateurError, UnreachableBudgetError
from secateur.plan import Plan
from secateur.progress import steps
from secateur.repair.judging import MARGIN, Judge
from secateur.score.combination import name_of

FEW, MORE = 1 / 16, 1 / 4
"""Shares of the data that repairs work on in the first round, and in the last."""

LEAST = 64
"""No fewer samples than this, where there are as many."""


@dataclass(frozen=True)
class Planned:
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

    @classmethod
    def of(cls, rule: Any, plan: Plan) -> Planned:
        """A plan that takes units or experts out."""
        return cls(
            rule, plan, plan.predicted.macs / plan.dense.macs, plan.predicted.params / plan.dense.params
        )


@dataclass(frozen=True)
class Field:
    """Who takes part.

    Attributes:
        planned: What each candidate that runs decided.
        others: The candidates that do not run, with the reason.
    """

    planned: dict[str, Planned]
    others: list[Candidate]

    @classmethod
    def of(
        cls,
        rules: Mapping[str, Any],
        missing: Mapping[str, str],
        decide: Callable[[Any], Planned],
        same: Callable[[Any, Any], bool],
    ) -> Field:
        """Let every candidate plan.

        Args:
            rules: The candidates.
            missing: Signals that there are no scores of, with the reason.
            decide: A candidate's answer.
            same: Whether two plans are equal.

        Raises:
            NothingToPruneError: No candidate can run; the message says why each cannot.
            UnreachableBudgetError: None reaches the budget.
        """
        field = cls({}, [])
        unreached: list[UnreachableBudgetError] = []
        for name, rule in rules.items():
            lacking = [missing[name_of(s)] for s in rule.signals if name_of(s) in missing]
            if lacking:
                field.others.append(_absent(name, lacking[0]))
                continue
            try:
                found = decide(rule)
            except SecateurError as error:
                if isinstance(error, UnreachableBudgetError):
                    unreached.append(error)
                field.others.append(_absent(name, str(error)))
                continue
            twin = next((n for n, other in field.planned.items() if same(other.plan, found.plan)), None)
            if twin is not None:
                field.others.append(_ran(Runner(name, out=f"the same plan as {twin}"), found))
                continue
            field.planned[name] = found
        if field.planned:
            return field
        if unreached:
            raise min(unreached, key=lambda error: error.smallest)
        why = "; ".join(f"{entry.name} {entry.verdict}" for entry in field.others)
        raise NothingToPruneError(f"auto: expected a candidate that can run, got none: {why}")


@dataclass(frozen=True)
class Way:
    """How a plan becomes a model that is judged.

    Attributes:
        repair: What repairs it; empty for nothing.
        make: Plan, and the data that the repair works on -> model.
    """

    repair: str
    make: Callable[[Any, Calibration], nn.Module]


def parts(data: Calibration, *, whole: bool = False) -> tuple[Calibration, Calibration]:
    """The data of the first round, and of the last; the same where there is little.

    Args:
        data: All that repairs may see.
        whole: Take whole batches only.
    """
    total = sum(batch.size for batch in data)
    few = thinned(data, max(FEW, LEAST / total), whole=whole)
    return few, (few if LEAST >= MORE * total else thinned(data, MORE, whole=whole))


def contend(
    field: Field,
    way: Way,
    few: Calibration,
    more: Calibration,
    finalists: int,
    judge: Judge,
    *,
    seed: int = 0,
    progress: bool = False,
) -> tuple[str, Contest]:
    """Let all race on a few samples, then those that may still win on more.

    Args:
        field: Who takes part.
        way: How models are made.
        few: The data of the first round.
        more: The data of the last; one round decides where that is the same, or nothing is repaired.
        finalists: How many come to the last round, at most.
        judge: Measures, on held-out data.
        seed: Of everything that draws.
        progress: Show bars on a terminal.

    Returns:
        The winner's name, and what became of each candidate.

    Raises:
        NothingToPruneError: No plan could be run; the message says why.
    """
    rounds = [(few, Heat(finalists, MARGIN)), (more, Heat(1, None))]
    if not way.repair or few is more:
        rounds = [(few, Heat(1, None))]

    def run(name: str, number: int) -> NDArray[np.float64] | str:
        step(f"{name}, round {number + 1}")
        try:
            return judge(way.make(field.planned[name].plan, rounds[number][0]))
        except SecateurError as error:
            return f"did not run: {error}"

    with seeded(seed), steps(None, progress) as step:
        order = race(list(field.planned), run, [heat for _, heat in rounds])
    if order[0].out:
        raise NothingToPruneError(f"auto: expected a candidate that can run, got none: {order[0].out}.")
    return order[0].name, Contest(
        measure=judge.measure,
        rounds=tuple(
            Round(repair=way.repair, samples=sum(batch.size for batch in data) if way.repair else 0)
            for data, _ in rounds[: len(order[0].errors)]
        ),
        held=judge.samples,
        candidates=(*(_ran(runner, field.planned[runner.name]) for runner in order), *field.others),
    )


def _ran(runner: Runner, found: Planned) -> Candidate:
    return Candidate(
        name=runner.name,
        macs=found.macs,
        params=found.params,
        errors=tuple(runner.errors),
        verdict=runner.out or "chosen",
    )


def _absent(name: str, why: str) -> Candidate:
    return Candidate(name=name, macs=None, params=None, errors=(), verdict=f"did not run: {why}")
