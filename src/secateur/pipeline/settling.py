"""A plan for what a module can express: what it cannot is left whole, and the budget is spent elsewhere."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from torch import nn

from secateur.allocators import Limits
from secateur.errors import NothingToPruneError, UnreachableBudgetError
from secateur.plan import Plan
from secateur.targets.units.record import record_of

PROGRAM = "Pass on_unrealisable='graph' for a captured program without that limit."
"""What `prune` offers where too few groups can be expressed."""


@dataclass(frozen=True, eq=False)
class Settled:
    """What `settle` found.

    Attributes:
        model: The smaller model; its record has the plan.
        whole: Groups that were decided on and left as they were, with the reason in a sentence.
    """

    model: nn.Module
    whole: Mapping[tuple[str, ...], str]

    @property
    def note(self) -> str:
        """The reasons, one after the other."""
        return " ".join(self.whole.values())


def settle(
    decide: Callable[[Limits | None], Plan],
    plan_and_apply: Callable[[Plan], nn.Module],
    limits: Limits | None,
    *,
    where: str = "prune",
    advice: str = PROGRAM,
) -> Settled:
    """Decide and apply until nothing that the plan removes is left whole.

    Args:
        decide: A plan within limits.
        plan_and_apply: `sc.apply` of a plan, which may leave groups whole.
        limits: What must stay.
        where: What an error names as its place.
        advice: What an error says to do.

    Raises:
        UnreachableBudgetError: The groups that a module can express do not reach the budget.
        NothingToPruneError: There is none.
    """
    found: dict[tuple[str, ...], str] = {}
    while True:
        try:
            plan = decide(limits)
        except UnreachableBudgetError as error:
            if not found:
                raise
            why = f"{error} Groups that no module can express stay whole. {advice}"
            raise UnreachableBudgetError(why, error.smallest) from error
        except NothingToPruneError as error:
            if not found:
                raise
            raise _none_left(found, where, advice) from error
        small = plan_and_apply(plan)
        whole = _left_whole(plan, record_of(small).plan)
        if not whole:
            return Settled(small, found)
        if all(any(name in names for names in found) for name in whole):
            # They were to stay whole already: a module cannot express what earlier rounds cut of them.
            raise _none_left(found, where, advice)
        found[whole] = record_of(small).whole
        limits = without(limits, whole)


def _none_left(found: Mapping[tuple[str, ...], str], where: str, advice: str) -> NothingToPruneError:
    reasons = [why.removeprefix("left whole: ") for why in found.values()]
    return NothingToPruneError(
        f"{where}: expected a group that a module can express, got none. The reason: {reasons[-1]} {advice}",
        " ".join(reasons),
    )


def without(limits: Limits | None, names: Iterable[str]) -> Limits:
    """The limits with further groups that stay whole, by name."""
    limits = limits or Limits()
    return replace(limits, ignore=(*limits.ignore, *map(glob.escape, names)))


def _left_whole(plan: Plan, done: Plan) -> tuple[str, ...]:
    """Groups that a plan cuts and a model does not."""
    kept = {group.name: group.kept for group in done.groups}
    return tuple(g.name for g in plan.groups if g.removed and kept.get(g.name) != g.kept)
