"""``allocator="search"``: move budget between groups, and compare plans by their repaired models."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from secateur.allocators import Budget, Limits, RepairAware
from secateur.calibration import Calibration, seeded
from secateur.calibration.subset import take_share
from secateur.common.progress import steps
from secateur.errors import BudgetError, SettingError, UnreachableBudgetError
from secateur.pipeline.auto.choose import FEW, Planned, checked, fixed, measured, plans, selected
from secateur.pipeline.auto.chooser import Choice, Chooser
from secateur.pipeline.auto.depth import PARTS
from secateur.pipeline.auto.rounds import Stage, run_rounds
from secateur.pipeline.auto.streams import streams
from secateur.pipeline.auto.waves import Vector, neighbours
from secateur.repairs.judging import Judge
from secateur.signals.distributed import team_of_processes
from secateur.targets.granularity import UNITS, refusal

if TYPE_CHECKING:
    from secateur.pipeline.targets.target import Scored, Target

EVALUATIONS = 60
"""Number of plans that are tried if neither `evaluations` nor `minutes` is given."""

SAMPLES = 256
"""While searching, repairs use at least this many samples, if there are that many; and a 16th of the data."""

TOGETHER = 8
"""Number of waves in a round (see `waves`)."""

ONLY_UNITS = "a search moves along curves of the error that units leave after repair"
"""Why other granularities are refused."""

WHOLE = 1e3
"""The factor of residual streams that should stay whole as long as other groups can lose units."""


@dataclass(frozen=True)
class Search(Chooser):
    """Moves budget between groups, and keeps the plan whose repaired model is closest to the dense one.

    `RepairAware` adds up the errors of groups, as if an error did the same harm in every group. Search starts
    from its plans. It multiplies the errors of each group by a factor (`RepairAware.factors`), and plans
    again; a higher factor lets a group keep more units. Each plan meets the budget and the limits. It is
    applied, repaired on a part of the data, and measured on held-out data: by the distance of the outputs to
    the dense model's, without labels, or by `loss_fn`. These errors decide which factors are tried next
    (`secateur.pipeline.auto.waves`). In the end the best plans and the first start are repaired on all data
    that repairs may use, and the best of them is chosen. So on the held-out data the result is never worse
    than the first start, by default `RepairAware`.

    Pass `Search`, or its name ``"search"``, as `allocator` to `sc.prune`. It decides on units only. A budget
    is needed. With `evaluations` alone, the same seed gives the same plan. With `minutes`, the result
    depends on the speed of the machine.

    Source: ours. Searched allocations are known from Týr and EvoPress for language models; the Lagrangian
    step along error curves is that of `RepairAware`.

    Attributes:
        evaluations: Largest number of plans that are tried before the last round, with the starts. None: 60;
            with `minutes`, no limit.
        minutes: Largest time for trying plans before the last round. None: no limit.
        starts: The rules to start from, by the name that the report shows. The best of them is the first
            point of the search. None: `RepairAware` by MACs, by parameters, by depth
            (`RepairAware.parts`), and with residual streams whole.
        finalists: Number of plans that the last round compares, besides the first start.

    Raises:
        SettingError: A setting is out of range, or a start is no `RepairAware`.

    Example:
        >>> import secateur as sc
        >>> sc.Search(evaluations=100).starts_or_default["repair_aware by params"].per
        'params'
    """

    evaluations: int | None = None
    minutes: float | None = None
    starts: Mapping[str, RepairAware] | None = None
    finalists: int = 3
    name: ClassVar[str] = "search"

    def __post_init__(self) -> None:
        """Check the values."""
        for name, least in (("evaluations", 1), ("finalists", 1)):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < least):
                raise SettingError(
                    f"search: expected {name} of at least {least}, got {value!r}. Pass {least}."
                )
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise SettingError(f"search: expected minutes above 0, got {self.minutes!r}. Pass 10.")
        if self.starts is not None:
            wrong = [repr(rule) for rule in self.starts.values() if not isinstance(rule, RepairAware)]
            if wrong or not self.starts:
                got = ", ".join(wrong) or "none"
                raise SettingError(
                    f"search: expected starts to be RepairAware rules by name, got {got}. "
                    "To compare other rules, use Auto."
                )
            object.__setattr__(self, "starts", MappingProxyType(dict(self.starts)))

    @property
    def starts_or_default(self) -> Mapping[str, RepairAware]:
        """The rules to start from: `starts`, or the default ones."""
        if self.starts is not None:
            return self.starts
        return {
            "repair_aware": RepairAware(),
            "repair_aware by depth": RepairAware(parts=PARTS),
            "repair_aware by params": RepairAware(per="params"),
        }

    def check(self, function: str, granularity: str) -> None:
        """Raise SettingError if the granularity is not one of units."""
        if granularity not in UNITS:
            raise refusal(f"{function}(allocator='search')", granularity, ONLY_UNITS)

    def candidates_for(self, target: Target) -> Mapping[str, RepairAware]:
        """The starts. By default also one that leaves residual streams whole, if there are any."""
        if self.starts is not None:
            return self.starts
        whole = dict.fromkeys(streams(target.graph), WHOLE)
        more = {"repair_aware, streams whole": RepairAware(factors=whole)} if whole else {}
        return {**self.starts_or_default, **more}

    def choose(self, target: Target, budget: Budget | None = None, known: Scored | None = None) -> Choice:
        """Search, and compare the best plans on all data that repairs may use."""
        if budget is None:
            raise BudgetError("search: expected a budget, got none. Pass Budget(macs=0.5), for example.")
        starts = self.candidates_for(target)
        known = target.score_candidates(starts.values()) if known is None else known
        return self._chosen(starts, {}, target, checked(self.name, budget), known)

    def after(self, found: Choice, target: Target, known: Scored) -> Choice:
        """Search, and compare the best plans with what was chosen before.

        Args:
            found: The earlier choice. The record lists its candidates, without errors: these were measured
                with other data.
            target: The target.
            known: Scores for the earlier candidates and for `candidates_for`.
        """
        first, *rest = found.selection.candidates
        choice = self._chosen(
            self.candidates_for(target), {first.name: found.rule}, target, found.budget, known
        )
        names = {candidate.name for candidate in choice.selection.candidates}
        earlier = tuple(
            each.model_copy(update={"errors": (), "verdict": f"before the search: {each.verdict}"})
            for each in rest
            if each.name not in names
        )
        candidates = (*choice.selection.candidates, *earlier)
        return replace(choice, selection=choice.selection.model_copy(update={"candidates": candidates}))

    def _chosen(
        self,
        starts: Mapping[str, RepairAware],
        earlier: Mapping[str, Any],
        target: Target,
        budget: Budget,
        known: Scored,
    ) -> Choice:
        """Search from the starts. The last round also compares the first start and the earlier."""
        task = target.task
        part = _part(task.fit, whole=fixed(target))
        planned, others = plans({**starts, **earlier}, target, known, budget, part)
        judge = Judge(task.model, task.held, task.loss_fn)
        tried = _Tried(target, known, budget, judge, part, planned)
        rounds = [(part, Stage(self.finalists, None)), (task.fit, Stage(1, None))]
        if not target.candidate_repair or part is task.fit:
            rounds = [(part, Stage(1, None))]
        last = {*[name for name in starts if name in planned][:1], *(earlier.keys() & planned.keys())}

        def run(name: str, number: int) -> NDArray[np.float64] | str:
            if number == 0:
                return tried.errors[name]
            step(f"{name}, all data")
            return measured(target, judge, planned[name].plan, task.fit)

        with seeded(task.seed), steps(None, task.progress) as step:
            self._search(tried, last, step)
            order = run_rounds(list(tried.errors), run, [stage for _, stage in rounds], always=last)
        selection = selected(order, planned, others, target, judge, [data for data, _ in rounds])
        return Choice(planned[order[0].name].rule, budget, known.scores, selection)

    def _search(self, tried: _Tried, always: Collection[str], step: Any) -> None:
        """Try the starts, and then neighbours of the best one, until `evaluations` or `minutes` are spent.

        Args:
            tried: The plans so far; new ones are added.
            always: Names of plans that are measured in any case.
            step: Shows the progress.
        """
        end = math.inf if self.minutes is None else time.monotonic() + 60 * self.minutes
        most = self.evaluations or (EVALUATIONS if self.minutes is None else math.inf)

        def spent() -> bool:
            with team_of_processes(tried.target.graph.device) as team:
                return team.from_first(len(tried.errors) >= most or time.monotonic() > end)

        for name in list(tried.planned):
            if name in always or not spent():
                step(name)
                tried.measure(name)
        moving = [name for name in tried.errors if isinstance(tried.planned[name].rule, RepairAware)]
        if not moving:
            return
        start = min(moving, key=tried.error)
        rule = tried.planned[start].rule
        proposals = neighbours(len(tried.groups), TOGETHER, tried.error(start))
        proposal = next(proposals, None)
        while proposal is not None and not spent():
            name, point = proposal
            step(name)
            try:
                proposal = proposals.send(tried.neighbour(name, rule, point))
            except StopIteration:
                return


@dataclass(eq=False)
class _Tried:
    """All plans that were tried.

    Attributes:
        target: The target.
        known: The scores.
        budget: The budget of all plans.
        judge: Measures models.
        part: The data that repairs read.
        planned: The plans, by name; new ones are added.
        errors: The errors of each measured plan, by name [samples]; or, as text, the reason for none.
    """

    target: Target
    known: Scored
    budget: Budget
    judge: Judge
    part: Calibration
    planned: dict[str, Planned]
    errors: dict[str, NDArray[np.float64] | str] = field(default_factory=dict)

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the groups that may lose units, in order of execution."""
        limits = self.target.task.limits or Limits()
        return tuple(group.name for group in limits.considered(self.target.graph.groups))

    def measure(self, name: str) -> None:
        """Repair and measure a plan."""
        self.errors[name] = measured(self.target, self.judge, self.planned[name].plan, self.part)

    def error(self, name: str) -> float:
        """The mean error of a plan; infinity if there is none."""
        errors = self.errors[name]
        mean = math.inf if isinstance(errors, str) else float(np.mean(errors))
        return mean if math.isfinite(mean) else math.inf

    def neighbour(self, name: str, rule: RepairAware, point: Vector) -> float:
        """Plan with other factors, and measure the plan if it is new.

        Args:
            name: The plan's name.
            rule: The rule that the search started from.
            point: Natural logarithms of the numbers that multiply its factors. [groups]

        Returns:
            The mean error; infinity if there is none.
        """
        factors = {
            group: rule.factors.get(group, 1.0) * math.exp(value)
            for group, value in zip(self.groups, point, strict=True)
        }
        moved = replace(rule, factors=factors)
        try:
            plan = self.target.allocate(moved, self.known.scores, self.budget)
        except UnreachableBudgetError:
            return math.inf
        equal = next((n for n, o in self.planned.items() if self.target.same(o.plan, plan)), None)
        if equal is not None:
            return self.error(equal) if equal in self.errors else math.inf
        self.planned[name] = Planned(moved, plan, *self.target.shares(plan))
        self.measure(name)
        return self.error(name)


def _part(data: Calibration, *, whole: bool) -> Calibration:
    """Return the data that repairs read while searching; all data if there are few."""
    return take_share(data, max(FEW, SAMPLES / data.samples()), whole=whole)
