"""A plan for what a module can express: what it cannot is left whole, and the budget is spent elsewhere."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterable
from dataclasses import replace

from torch import nn

from secateur.allocate import Limits
from secateur.apply.record import record_of, with_note
from secateur.errors import NothingToPruneError, UnreachableBudgetError
from secateur.plan import Plan


def settle(
    decide: Callable[[Limits | None], Plan], carry_out: Callable[[Plan], nn.Module], limits: Limits | None
) -> nn.Module:
    """Decide and apply until nothing that the plan removes is left whole.

    Args:
        decide: A plan within limits.
        carry_out: `sc.apply` of a plan, which may leave groups whole.
        limits: What must stay.

    Returns:
        The smaller model. Its record has the plan, and its note says what was left whole and why.

    Raises:
        UnreachableBudgetError: The groups that a module can express do not reach the budget.
        NothingToPruneError: There is none.
    """
    notes: list[str] = []
    while True:
        try:
            plan = decide(limits)
        except (UnreachableBudgetError, NothingToPruneError) as error:
            if not notes:
                raise
            why = (
                f"{error} Groups that no module can express stay whole. Pass on_unrealisable='graph' for a "
                f"captured program without that limit."
            )
            if isinstance(error, UnreachableBudgetError):
                raise UnreachableBudgetError(why, error.smallest) from error
            raise NothingToPruneError(why, " ".join(notes)) from error
        small = carry_out(plan)
        whole = _left_whole(plan, record_of(small).plan)
        if not whole:
            return with_note(small, " ".join(notes)) if notes else small
        notes.append(record_of(small).note)
        limits = without(limits, whole)


def without(limits: Limits | None, names: Iterable[str]) -> Limits:
    """The limits with further groups that stay whole, by name."""
    limits = limits or Limits()
    return replace(limits, ignore=(*limits.ignore, *map(glob.escape, names)))


def _left_whole(plan: Plan, done: Plan) -> tuple[str, ...]:
    """Groups that a plan cuts and a model does not."""
    kept = {group.name: group.kept for group in done.groups}
    return tuple(g.name for g in plan.groups if g.removed and kept.get(g.name) != g.kept)
