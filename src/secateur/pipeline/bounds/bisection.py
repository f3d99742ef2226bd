"""Bisection over the share of the dense cost that plans keep."""

from __future__ import annotations

from collections.abc import Callable

from secateur.errors import UnreachableBudgetError

GAP = 0.005
"""The search ends when the shares that work and that do not are this close."""


def bisect(
    works: Callable[[float], bool], good: float, bad: float, first: float, *, probes: int, gap: float = GAP
) -> None:
    """Ask about shares between one that is good and one that is bad, each time halving what is left.

    `works` notes what it finds. Where it is monotone, the last share that worked is within `gap` of the
    border, or `probes` ended the search. Where it is not, the caller still knows about each share that it
    was asked for.

    Args:
        works: Whether the plan that keeps this share is within all bounds. Raises UnreachableBudgetError if
            no plan keeps so little, with the smallest share that one keeps.
        good: A share that works, or is hoped to.
        bad: A share that does not, or need not be asked for.
        first: The first share to ask for.
        probes: Most shares to ask for.
        gap: When to end.
    """
    asked = first
    for _ in range(probes):
        try:
            found = works(asked)
        except UnreachableBudgetError as error:
            if not asked < error.smallest <= max(good, bad):
                return
            asked = error.smallest  # nothing keeps less, so this is one end of what is left
            good, bad = (asked, bad) if good < bad else (good, asked)
            found = works(asked)
        if found:
            good = asked
        else:
            bad = asked
        if abs(good - bad) < gap:
            return
        asked = (good + bad) / 2
