"""Pruning in rounds: remove a little, repair, look again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

from torch import nn

from secateur.allocate import Budget, Limits
from secateur.allocate.registry import Allocates
from secateur.allocate.unit_distortions import with_unit_curves
from secateur.apply.apply import apply
from secateur.apply.composing import compose, split
from secateur.apply.record import record_of
from secateur.calibration import Calibration
from secateur.errors import SettingError
from secateur.graph.graph import Graph
from secateur.graph.trace import trace
from secateur.plan import Plan
from secateur.progress import steps as bar
from secateur.repair.repair import repair as repair_model
from secateur.score import Scores, score
from secateur.score.loss import LossFn
from secateur.settling import settle, without


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
    """One plan for the dense model, decided in rounds, and the note of the first.

    After round k the cost is the dense one times ``share^(k / count)``: every round removes the same fraction
    of what the one before left. In between, the plan so far is applied to the dense model and repaired, and
    the result is traced and scored anew: units that became redundant, or indispensable, since others went are
    seen as such. The weights that users get come from one repair of the last plan, as if it had been decided
    at once.

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
        SecateurError: One of its kinds; see each step.
    """
    methods = "reconstruct" if repair == "auto" else repair

    def carried(model: nn.Module, graph: Graph) -> Callable[[Plan], nn.Module]:
        return lambda plan: apply(model, plan, graph=graph, on_unrealisable=on_unrealisable)

    small = settle(first, carried(model, graph), limits)
    note = record_of(small).note
    with bar(count - 1, progress) as step:
        for round_ in range(2, count + 1):
            step(f"round {round_} of {count}")
            so_far = record_of(small)
            small = repair_model(
                small, model, data, methods, graph=graph, loss_fn=loss_fn, seed=seed, progress=False
            )
            example = data.first()
            now = trace(small, example.inputs, allow_inexact=allow_inexact)
            scores = score(now, data, rule.signals, loss_fn=loss_fn, seed=seed, progress=False)
            curved = with_unit_curves(rule, now, data, scores)
            left = budget_after(round_, count, budget, graph)
            # A plan cannot say what the parts of a group lose.
            within = without(limits, split(now.groups, so_far.plan))
            decide = partial(_decided, curved, now, scores, left, seed)
            both = compose(so_far, record_of(settle(decide, carried(small, now), within))).plan
            settings = {**both.settings, "steps": count}
            both = both.model_copy(update={"budget": budget.as_settings(), "settings": settings})
            small = carried(model, graph)(both)
    return record_of(small).plan, note


def _decided(
    rule: Allocates, graph: Graph, scores: Scores, budget: Budget, seed: int, limits: Limits | None
) -> Plan:
    plan: Plan = rule.allocate(graph, scores, budget, limits, seed)
    return plan


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
