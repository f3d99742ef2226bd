"""Pruning in rounds: remove a few units, repair, trace and score again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from secateur.allocators import Budget, Limits
from secateur.allocators.registry import Allocates
from secateur.common.progress import steps as bar
from secateur.errors import NothingToPruneError, SettingError
from secateur.graph.graph import Graph
from secateur.pipeline.expressible import PROGRAM, limits_ignoring, plan_until_expressible
from secateur.pipeline.resuming import scored_once
from secateur.plan import Plan
from secateur.signals import Scores
from secateur.targets.units.record import record_of

if TYPE_CHECKING:
    from secateur.pipeline.targets.target import Target
    from secateur.targets.experts.graph import ExpertGraph


def plan_in_steps(
    target: Target,
    rule: Allocates,
    first: Callable[[Limits | None], Plan],
    budget: Budget,
    limits: Limits | None = None,
) -> tuple[Plan, str]:
    """Make one plan for the dense model in rounds. Also return a note on the groups that stayed whole.

    After round k of n the cost is the dense cost times ``share^(k / n)``, where `share` is the budget's: each
    round removes the same fraction of what is left. Between two rounds the plan so far is applied to the
    dense model and repaired, and the result is traced and scored again. So the scores show if a unit has
    become redundant, or indispensable, after others were removed. Each round's plan is combined with the
    earlier ones to a plan for the dense model. The result is made from the last plan, and repaired once.

    Source: iterative magnitude pruning (Han et al. 2015, arXiv 1506.02626) trains between two rounds; here
    a closed-form repair takes the place of training.

    Args:
        target: The target. Its task has the number of rounds.
        rule: The allocator.
        first: Makes the plan of the first round, for the budget `budget_after`, within limits.
        budget: The budget of the last round: a bound on MACs, parameters, experts or blocks.
        limits: The limits of every round.

    Raises:
        SettingError: The budget bounds something else.
        NothingToPruneError: No group is left that a round could prune.
        SecateurError: One of its kinds; see each step.
    """
    task = target.task
    count, fit = task.steps, task.fit
    found = plan_until_expressible(first, target.apply_between_rounds, limits)
    whole = dict(found.whole)
    with bar(count - 1, task.progress) as step:
        for round_ in range(2, count + 1):
            step(f"round {round_} of {count}")
            so_far = record_of(found.model).plan
            between = target.repair_between_rounds(found.model)
            now = target.trace(between)
            options: dict[str, Any] = {"loss_fn": task.loss_fn, "seed": task.seed, "progress": False}
            scores = scored_once(now, between, fit, rule.signals, **options)
            curved = target.with_curves(rule, now, fit, scores)
            left = target.budget_in_round(now, so_far, budget_after(round_, count, budget, target.graph))
            where = f"prune: round {round_} of {count}"
            mine = target.limits_in_round(now, so_far, limits)
            within = _same_units(now, target.unmatched_groups(now.groups, so_far), mine, where)

            def decide(
                limits: Limits | None,
                rule: Any = curved,
                now: Any = now,
                scores: Scores = scores,
                left: Budget = left,
                so_far: Plan = so_far,
            ) -> Plan:
                return target.compose(so_far, rule.allocate(now, scores, left, limits, task.seed))

            found = plan_until_expressible(
                decide,
                target.apply_between_rounds,
                within,
                where=where,
                advice=f"Use fewer steps. {PROGRAM}",
            )
            whole = {**found.whole, **whole}
    plan = record_of(found.model).plan
    cut = {group.name for group in plan.groups if group.removed}
    update = {"budget": budget.as_settings(), "settings": {**plan.settings, "steps": count}}
    return plan.model_copy(update=update), " ".join(
        why for names, why in whole.items() if not {*names} <= cut
    )


def _same_units(graph: Any, apart: tuple[str, ...], limits: Limits | None, where: str) -> Limits | None:
    """Return the limits with groups ignored that correspond to no single group of the dense model.

    An earlier round can split a group in two. A plan for the dense model cannot say what each part loses.

    Raises:
        NothingToPruneError: No group is left.
    """
    if not apart:
        return limits
    within = limits_ignoring(limits, apart)
    try:
        within.considered(graph.groups)
    except NothingToPruneError as error:
        raise NothingToPruneError(
            f"{where}: expected a group that may still lose units, got none: earlier rounds split "
            f"{', '.join(apart[:3])}{', …' if apart[3:] else ''} into parts that one plan for the dense "
            "model cannot name. Use fewer steps."
        ) from error
    return within


def budget_after(round_: int, count: int, budget: Budget, graph: Graph | ExpertGraph) -> Budget:
    """Return the budget of one round, in absolute numbers.

    Raises:
        SettingError: The budget bounds something else than MACs, parameters, experts or blocks.
    """
    bounds = set(budget.as_settings()) - {"spend"}
    if not bounds <= {"macs", "params", "experts", "blocks"}:
        raise SettingError(
            "steps: expected a budget of macs or params, of experts or of blocks, got "
            f"{', '.join(sorted(bounds))}. Leave steps out."
        )
    dense = graph.cost()
    target = budget.targets(dense)

    def left(name: str) -> int:
        whole = getattr(dense, name)
        share = target[name] / whole
        return target[name] if round_ == count else max(1, int(whole * share ** (round_ / count)))

    found: dict[str, Any] = {name: left(name) for name in bounds}
    return replace(budget, **found)
