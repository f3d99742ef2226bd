"""Racing: what is clearly worse is dropped early, so that effort goes to what may win.

Sources: Maron & Moore 1994, Hoeffding races, for dropping what a test says is worse; Jamieson & Talwalkar
2016 (arXiv 1502.07943), successive halving, for giving those that are left more each round.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from secateur.repair.judging import standard_errors


@dataclass(frozen=True)
class Heat:
    """What a round decides.

    Attributes:
        places: How many are left after it, at most.
        margin: Standard errors of the difference to the best, sample by sample, beyond which one is clearly
            worse and out; None: the round says too little for that.
    """

    places: int
    margin: float | None


@dataclass
class Runner:
    """One that takes part.

    Attributes:
        name: Its name.
        errors: The mean of each round that it ran in.
        out: Why it is out; empty while it runs, and for the winner.
    """

    name: str
    errors: list[float] = field(default_factory=list)
    out: str = ""


def race(
    names: Sequence[str],
    run: Callable[[str, int], NDArray[np.float64] | str],
    heats: Sequence[Heat],
) -> list[Runner]:
    """Let all run, then those that may still win, on more, and so on.

    Args:
        names: Who takes part; of equals the earlier is preferred.
        run: Name and round -> the error of each of the same samples [samples], lower is better; or why there
            is none.
        heats: What each round decides; the last leaves one. The race ends as soon as one is left.

    Returns:
        All, best first: by the round that they came to, then by its mean. The first has won, unless `out`
        says otherwise: then nobody could run.
    """
    runners = [Runner(name) for name in names]
    running = list(runners)
    for number, heat in enumerate(heats):
        found: dict[str, NDArray[np.float64]] = {}
        for runner in running:
            errors = run(runner.name, number)
            if isinstance(errors, str):
                runner.out = errors
            else:
                found[runner.name] = errors
                runner.errors.append(float(np.mean(errors)))
        running = [runner for runner in running if runner.name in found]
        running.sort(key=lambda runner: _last(runner.errors[-1]))
        for place, runner in enumerate(running[1:], start=1):
            behind = standard_errors(found[runner.name] - found[running[0].name])
            if place >= heat.places or (heat.margin is not None and behind > heat.margin):
                how = f"{behind:.1f} standard errors behind" if np.isfinite(behind) else "far behind"
                runner.out = f"round {number + 1}: place {place + 1}, {how}"
        running = [runner for runner in running if not runner.out]
        if len(running) < 2:
            break
    order = {name: k for k, name in enumerate(names)}
    ran = [r for r in runners if r.errors]
    ran.sort(key=lambda r: (r.out != "", -len(r.errors), _last(r.errors[-1]), order[r.name]))
    return ran + [r for r in runners if not r.errors]


def _last(error: float) -> float:
    return error if np.isfinite(error) else float("inf")
