"""Pruning in rounds: remove a little, repair, look again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from secateur.allocators import Budget, Limits
from secateur.allocators.registry import Allocates
from secateur.common.progress import steps as bar
from secateur.errors import NothingToPruneError, SettingError
from secateur.graph.graph import Graph
from secateur.pipeline.resuming import scored_once
from secateur.pipeline.settling import PROGRAM, settle, without
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
    """One plan for the dense model, decided in rounds, and what these left whole.

    After round k the cost is the dense one times ``share^(k / count)``: every round removes the same fraction
    of what the one before left. In between, the plan so far is applied to the dense model and repaired, and
    the result is traced and scored anew: units that became redundant, or indispensable, since others went are
    seen as such. What a round decides is carried out on the dense model, together with what went before. The
    weights that users get come from one repair of the last plan, as if it had been decided at once.

    Source: iterative magnitude pruning (Han et al. 2015, arXiv 1506.02626) alternates so with training; here
    a closed-form repair takes the place of training.

    Args:
        target: What is removed; its task says in how many rounds.
        rule: What decides in each round.
        first: Its plan for the first round's budget, `budget_after`, within limits.
        budget: What the last round leaves, of MACs, parameters, experts or blocks.
        limits: What must stay, in every round.

    Raises:
        SettingError: See `budget_after`.
        NothingToPruneError: No group is left that a round could decide on.
        SecateurError: One of its kinds; see each step.
    """
    task = target.task
    count, fit = task.steps, task.fit
    found = settle(first, target.apply_between_rounds, limits)
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

            found = settle(
                decide,
                target.apply_between_rounds,
                within,
                where=where,
                advice=f"Take fewer steps. {PROGRAM}",
            )
            whole = {**found.whole, **whole}
    plan = record_of(found.model).plan
    cut = {group.name for group in plan.groups if group.removed}
    update = {"budget": budget.as_settings(), "settings": {**plan.settings, "steps": count}}
    return plan.model_copy(update=update), " ".join(
        why for names, why in whole.items() if not {*names} <= cut
    )


def _same_units(graph: Any, apart: tuple[str, ...], limits: Limits | None, where: str) -> Limits | None:
    """The limits without groups of which other units are left than the dense model has.

    A plan for the dense model cannot say what the parts of a group lose.

    Raises:
        NothingToPruneError: No group is left.
    """
    if not apart:
        return limits
    within = without(limits, apart)
    try:
        within.considered(graph.groups)
    except NothingToPruneError as error:
        raise NothingToPruneError(
            f"{where}: expected a group whose units may still go, got none: what is left of "
            f"{', '.join(apart[:3])}{', …' if apart[3:] else ''} would go in other units than those of the "
            "dense model, and one plan cannot say both. Take fewer steps."
        ) from error
    return within


def budget_after(round_: int, count: int, budget: Budget, graph: Graph | ExpertGraph) -> Budget:
    """What is left after a round, in absolute numbers.

    Raises:
        SettingError: The budget is of something else than MACs, parameters, experts and blocks.
    """
    asked = set(budget.as_settings()) - {"spend"}
    if not asked <= {"macs", "params", "experts", "blocks"}:
        raise SettingError(
            "steps: expected a budget of macs or params, of experts or of blocks, got "
            f"{', '.join(sorted(asked))}. Leave steps out."
        )
    dense = graph.cost()
    target = budget.targets(dense)

    def left(name: str) -> int:
        whole = getattr(dense, name)
        share = target[name] / whole
        return target[name] if round_ == count else max(1, int(whole * share ** (round_ / count)))

    found: dict[str, Any] = {name: left(name) for name in asked}
    return replace(budget, **found)
