"""Plan only for groups that a module can express: other groups stay whole, and the rest meets the budget."""

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
"""The advice of `prune` if a module can express too few groups."""


@dataclass(frozen=True, eq=False)
class Expressible:
    """The result of `plan_until_expressible`.

    Attributes:
        model: The smaller model. Its record has the plan.
        whole: Names of the groups that a plan pruned and no module could express -> the reason, a sentence.
    """

    model: nn.Module
    whole: Mapping[tuple[str, ...], str]

    @property
    def note(self) -> str:
        """All reasons, joined."""
        return " ".join(self.whole.values())


def plan_until_expressible(
    decide: Callable[[Limits | None], Plan],
    apply_plan: Callable[[Plan], nn.Module],
    limits: Limits | None,
    *,
    where: str = "prune",
    advice: str = PROGRAM,
) -> Expressible:
    """Plan and apply. Repeat without the groups that were left whole, until the whole plan was applied.

    Args:
        decide: Makes a plan within limits.
        apply_plan: Applies a plan. It may leave groups whole.
        limits: The limits of the first plan.
        where: Start of error messages.
        advice: End of error messages: what to do.

    Raises:
        UnreachableBudgetError: The groups that a module can express are too few for the budget.
        NothingToPruneError: A module can express none of the groups.
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
        small = apply_plan(plan)
        whole = _left_whole(plan, record_of(small).plan)
        if not whole:
            return Expressible(small, found)
        if all(any(name in names for names in found) for name in whole):
            # These limits ignore them already: a module cannot express what earlier rounds removed from them.
            raise _none_left(found, where, advice)
        found[whole] = record_of(small).whole
        limits = limits_ignoring(limits, whole)


def _none_left(found: Mapping[tuple[str, ...], str], where: str, advice: str) -> NothingToPruneError:
    reasons = [why.removeprefix("left whole: ") for why in found.values()]
    return NothingToPruneError(
        f"{where}: expected a group that a module can express, got none. Reason: {reasons[-1]} {advice}",
        " ".join(reasons),
    )


def limits_ignoring(limits: Limits | None, names: Iterable[str]) -> Limits:
    """Return the limits with further groups, given by name, added to `ignore`."""
    limits = limits or Limits()
    return replace(limits, ignore=(*limits.ignore, *map(glob.escape, names)))


def _left_whole(plan: Plan, done: Plan) -> tuple[str, ...]:
    """Names of the groups that the plan prunes and the model still has whole."""
    kept = {group.name: group.kept for group in done.groups}
    return tuple(g.name for g in plan.groups if g.removed and kept.get(g.name) != g.kept)
