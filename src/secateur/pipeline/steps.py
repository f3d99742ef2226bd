"""Pruning in rounds: remove a little, repair, look again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

from torch import nn

from secateur.allocators import Budget, Limits
from secateur.allocators.registry import Allocates
from secateur.allocators.unit_distortions import with_unit_curves
from secateur.calibration import Calibration
from secateur.common.progress import steps as bar
from secateur.errors import NothingToPruneError, SettingError
from secateur.graph.graph import Graph
from secateur.graph.trace import trace
from secateur.pipeline.settling import PROGRAM, settle, without
from secateur.plan import Plan
from secateur.repairs.repair import repair as repair_model
from secateur.signals import Scores, score
from secateur.signals.loss import LossFn
from secateur.targets.units.apply import Applier
from secateur.targets.units.composing import compose_plans, split
from secateur.targets.units.record import record_of


def plan_in_steps(
    model: nn.Module,
    graph: Graph,
    data: Calibration,
    rule: Allocates,
    first: Callable[[Limits | None], Plan],
    budget: Budget,
    count: int,
    limits: Limits | None = None,
    *,
    on_unrealisable: Literal["graph", "leave"] = "leave",
    repair: str | Sequence[str] | None = "auto",
    allow_inexact: bool = False,
    loss_fn: LossFn | None = None,
    seed: int = 0,
    progress: bool = False,
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
        model: The dense model.
        graph: Its trace.
        data: Calibration data for scores and repairs.
        rule: What decides in each round.
        first: Its plan for the first round's budget, `budget_after`, within limits.
        budget: What the last round leaves, of MACs, parameters or both.
        count: How many rounds.
        limits: What must stay, in every round.
        on_unrealisable: As for `sc.apply`.
        repair: Between rounds, as for `sc.repair`; ``auto`` is ``reconstruct``.
        allow_inexact: As for `sc.trace`.
        loss_fn: As for `sc.score`.
        seed: Seed for all random choices.
        progress: Show bars on a terminal.

    Raises:
        SettingError: See `budget_after`.
        NothingToPruneError: No group is left that a round could decide on.
        SecateurError: One of its kinds; see each step.
    """
    methods = "reconstruct" if repair == "auto" else repair
    carry_out = partial(Applier(model, graph), on_unrealisable=on_unrealisable)
    found = settle(first, carry_out, limits)
    whole = dict(found.whole)
    with bar(count - 1, progress) as step:
        for round_ in range(2, count + 1):
            step(f"round {round_} of {count}")
            so_far = record_of(found.model).plan
            small = repair_model(
                found.model, model, data, methods, graph=graph, loss_fn=loss_fn, seed=seed, progress=False
            )
            example = data.first()
            now = trace(small, example.inputs, allow_inexact=allow_inexact)
            scores = score(now, data, rule.signals, loss_fn=loss_fn, seed=seed, progress=False)
            curved = with_unit_curves(rule, now, data, scores)
            left = budget_after(round_, count, budget, graph)
            where = f"prune: round {round_} of {count}"
            within = _same_units(now, so_far, limits, where)
            decide = partial(_decided, curved, now, scores, left, seed, so_far)
            found = settle(decide, carry_out, within, where=where, advice=f"Take fewer steps. {PROGRAM}")
            whole = {**found.whole, **whole}
    plan = record_of(found.model).plan
    cut = {group.name for group in plan.groups if group.removed}
    update = {"budget": budget.as_settings(), "settings": {**plan.settings, "steps": count}}
    return plan.model_copy(update=update), " ".join(
        why for names, why in whole.items() if not {*names} <= cut
    )


def _same_units(graph: Graph, so_far: Plan, limits: Limits | None, where: str) -> Limits:
    """The limits without groups of which other units are left than the dense model has.

    A plan for the dense model cannot say what the parts of a group lose.

    Raises:
        NothingToPruneError: No group is left.
    """
    apart = split(graph.groups, so_far)
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


def _decided(
    rule: Allocates,
    graph: Graph,
    scores: Scores,
    budget: Budget,
    seed: int,
    so_far: Plan,
    limits: Limits | None,
) -> Plan:
    """What a round decides, as a plan for the dense model."""
    return compose_plans(so_far, rule.allocate(graph, scores, budget, limits, seed))


def budget_after(round_: int, count: int, budget: Budget, graph: Graph) -> Budget:
    """What is left after a round, in absolute numbers.

    Raises:
        SettingError: The budget is of something else than MACs and parameters.
    """
    asked = set(budget.as_settings()) - {"spend"}
    if not asked <= {"macs", "params"}:
        raise SettingError(
            f"steps: expected a budget of macs or params, got {', '.join(sorted(asked))}. Do leave steps out."
        )
    dense = graph.cost()
    target = budget.targets(dense)

    def left(name: str) -> int | None:
        if name not in asked:
            return None
        whole = getattr(dense, name)
        share = target[name] / whole
        return target[name] if round_ == count else max(1, int(whole * share ** (round_ / count)))

    return replace(budget, macs=left("macs"), params=left("params"))
