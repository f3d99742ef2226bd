"""Rounds of measurement: a candidate that is clearly worse is dropped early, to save time for the others.

Sources: Maron & Moore 1994, Hoeffding races, for dropping what a test says is worse; Jamieson & Talwalkar
2016 (arXiv 1502.07943), successive halving, for giving the others more data each round.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from secateur.repair.judging import standard_errors


@dataclass(frozen=True)
class Stage:
    """How many candidates a round leaves.

    Attributes:
        places: The most candidates that are left after it.
        margin: A candidate that is more standard errors than this behind the best, sample by sample, is out.
            None: no candidate is out for that.
    """

    places: int
    margin: float | None


@dataclass
class Entrant:
    """A candidate, and how it did.

    Attributes:
        name: Its name.
        errors: Its mean error in each round that it ran in.
        out: Why it is out; empty for the winner, and before it is out.
    """

    name: str
    errors: list[float] = field(default_factory=list)
    out: str = ""


def run_rounds(
    names: Sequence[str],
    run: Callable[[str, int], NDArray[np.float64] | str],
    stages: Sequence[Stage],
) -> list[Entrant]:
    """Measure all candidates, then those that may still win, and so on, until one is left.

    Args:
        names: Of the candidates; of equal ones the earlier is preferred.
        run: Name and round -> the error of each of the same samples [samples], lower is better; or why there
            is none.
        stages: One for each round; the last leaves one candidate.

    Returns:
        All, best first: by the last round that they ran in, then by their mean there. The first is the
        winner, unless its `out` says why it did not run: then no candidate could.
    """
    entrants = [Entrant(name) for name in names]
    left = list(entrants)
    for number, stage in enumerate(stages):
        found: dict[str, NDArray[np.float64]] = {}
        for entrant in left:
            errors = run(entrant.name, number)
            if isinstance(errors, str):
                entrant.out = errors
            else:
                found[entrant.name] = errors
                entrant.errors.append(float(np.mean(errors)))
        left = [entrant for entrant in left if entrant.name in found]
        left.sort(key=lambda entrant: _last(entrant.errors[-1]))
        for place, entrant in enumerate(left[1:], start=1):
            behind = standard_errors(found[entrant.name] - found[left[0].name])
            if place >= stage.places or (stage.margin is not None and behind > stage.margin):
                how = f"{behind:.1f} standard errors behind" if np.isfinite(behind) else "far behind"
                entrant.out = f"round {number + 1}: place {place + 1}, {how}"
        left = [entrant for entrant in left if not entrant.out]
        if len(left) < 2:
            break
    order = {name: k for k, name in enumerate(names)}
    ran = [r for r in entrants if r.errors]
    ran.sort(key=lambda r: (r.out != "", -len(r.errors), _last(r.errors[-1]), order[r.name]))
    return ran + [r for r in entrants if not r.errors]


def _last(error: float) -> float:
    return error if np.isfinite(error) else float("inf")
