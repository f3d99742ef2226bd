"""Pruning in rounds: remove a little, repair, look again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

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
from secateur.score import score
from secateur.score.loss import LossFn


def plan_in_steps(
    model: nn.Module,
    graph: Graph,
    data: Calibration,
    rule: Allocates,
    first: Plan,
    budget: Budget,
    count: int,
    limits: Limits | None = None,
    *,
    repair: str | Sequence[str] | None = "auto",
    allow_inexact: bool = False,
    loss_fn: LossFn | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Plan:
    """One plan for the dense model, decided in rounds.

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
        first: Its plan for the first round's budget, `budget_after`.
        budget: What the last round leaves, of MACs, parameters or both.
        count: How many rounds.
        limits: What must stay, in every round.
        repair: Between rounds, as for `sc.repair`; ``auto`` is ``reconstruct``.
        allow_inexact: As for `sc.trace`.
        loss_fn: As for `sc.score`.
        seed: Of everything that draws.
        progress: Show bars on a terminal.

    Raises:
        SettingError: See `budget_after`.
        SecateurError: One of its kinds; see each step.
    """
    methods = "reconstruct" if repair == "auto" else repair
    small = apply(model, first, graph=graph)
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
            plan: Plan = curved.allocate(now, scores, left, _whole(limits, now, so_far.plan), seed)
            both = compose(so_far, record_of(apply(small, plan, graph=now))).plan
            settings = {**both.settings, "steps": count}
            both = both.model_copy(update={"budget": budget.as_settings(), "settings": settings})
            small = apply(model, both, graph=graph)
    return record_of(small).plan


def _whole(limits: Limits | None, graph: Graph, before: Plan) -> Limits:
    """The limits, without groups that fell apart: a plan for the dense model cannot say what they lose."""
    limits = limits or Limits()
    return replace(limits, ignore=(*limits.ignore, *split(graph.groups, before)))


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
