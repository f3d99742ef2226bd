"""Measure candidates in rounds, and drop clearly worse ones early to save time.

Sources: Maron & Moore 1994, Hoeffding races: drop candidates that a statistical test shows to be worse.
    Jamieson &
Talwalkar 2016 (arXiv 1502.07943), successive halving: give the remaining candidates more data in each round.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from secateur.repairs.judging import standard_errors


@dataclass(frozen=True)
class Stage:
    """The rule by which one round drops candidates.

    Attributes:
        places: Largest number of candidates that remain.
        margin: A candidate is dropped if its errors, compared with the best one's sample by sample, are worse
            by more than this many standard errors. None: no candidate is dropped for this reason.
    """

    places: int
    margin: float | None


@dataclass
class CandidateResult:
    """A candidate and its results.

    Attributes:
        name: The candidate's name.
        errors: Its mean error in each round in which it ran. Lower is better.
        out: Why it was dropped; empty if it was not.
    """

    name: str
    errors: list[float] = field(default_factory=list)
    out: str = ""


def run_rounds(
    names: Sequence[str],
    run: Callable[[str, int], NDArray[np.float64] | str],
    stages: Sequence[Stage],
    always: Collection[str] = (),
) -> list[CandidateResult]:
    """Measure all candidates, drop the worse ones, and repeat until one is left.

    Args:
        names: Names of the candidates. Of equal candidates, the earlier one is preferred.
        run: Function (name, number of the round from 0) -> error of each sample [samples], lower is better.
            All candidates get the same samples. If a candidate cannot run: the reason, as text.
        stages: One for each round. The last one leaves one candidate.
        always: Candidates that only the last round may drop, if they can run.

    Returns:
        All candidates, best first: sorted by the last round they reached, then by their mean error in it. The
        first is the winner. If its `out` is not empty, no candidate could run.
    """
    entrants = [CandidateResult(name) for name in names]
    left = list(entrants)
    for number, stage in enumerate(stages):
        found: dict[str, NDArray[np.float64]] = {}
        for candidate in left:
            errors = run(candidate.name, number)
            if isinstance(errors, str):
                candidate.out = errors
            else:
                found[candidate.name] = errors
                candidate.errors.append(float(np.mean(errors)))
        left = [candidate for candidate in left if candidate.name in found]
        left.sort(key=lambda candidate: _finite(candidate.errors[-1]))
        for place, candidate in enumerate(left[1:], start=1):
            behind = standard_errors(found[candidate.name] - found[left[0].name])
            if candidate.name in always and number + 1 < len(stages):
                continue
            if place >= stage.places or (stage.margin is not None and behind > stage.margin):
                how = f"{behind:.1f} standard errors behind" if np.isfinite(behind) else "far behind"
                candidate.out = f"round {number + 1}: place {place + 1}, {how}"
        left = [candidate for candidate in left if not candidate.out]
        if len(left) < 2:
            break
    order = {name: k for k, name in enumerate(names)}
    ran = [r for r in entrants if r.errors]
    ran.sort(key=lambda r: (r.out != "", -len(r.errors), _finite(r.errors[-1]), order[r.name]))
    return ran + [r for r in entrants if not r.errors]


def _finite(error: float) -> float:
    """Replace NaN by infinity, so that it sorts last."""
    return error if np.isfinite(error) else float("inf")
