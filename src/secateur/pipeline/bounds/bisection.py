"""Bisection over the share of the dense cost that a plan keeps."""

from __future__ import annotations

from collections.abc import Callable

from secateur.errors import UnreachableBudgetError

GAP = 0.005
"""The search ends when the best share that works and the nearest one that does not are this close."""


def bisect(
    works: Callable[[float], bool], good: float, bad: float, first: float, *, probes: int, gap: float = GAP
) -> None:
    """Try shares between a good one and a bad one, and halve the range each time.

    Nothing is returned: `works` has to remember its results. If `works` is monotone, the last share that
    worked is within `gap` of the best one, unless `probes` ended the search.

    Args:
        works: Whether the plan that keeps a share is within all bounds. Raises UnreachableBudgetError if no
            plan keeps so little; `smallest` is the smallest share that a plan keeps.
        good: A share that works, or may work. It is not tried.
        bad: A share that does not work, or is of no interest. It is not tried.
        first: The first share to try.
        probes: The search ends after this many shares.
        gap: The search ends when `good` and `bad` are this close.
    """
    share = first
    for _ in range(probes):
        try:
            found = works(share)
        except UnreachableBudgetError as error:
            if not share < error.smallest <= max(good, bad):
                return
            share = error.smallest  # no plan keeps less, so this is one end of the range
            good, bad = (share, bad) if good < bad else (good, share)
            found = works(share)
        if found:
            good = share
        else:
            bad = share
        if abs(good - bad) < gap:
            return
        share = (good + bad) / 2
