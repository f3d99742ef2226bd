"""Everyone, at every point, for every seed; what is in the result file already is not run again."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from benchmarks.frontier.entrant import Entrant
from benchmarks.frontier.store import Run, Store
from benchmarks.frontier.summary import BEHIND, COLUMNS, OURS, OURS_BEHIND, REPAIRED
from benchmarks.frontier.workload import Draw, Workload

LIMIT_SECONDS = 900.0
"""Of processor time, for one entrant at one point."""


def run(
    workload: Workload,
    store: Store,
    entrants: Sequence[Entrant],
    points: Sequence[float],
    seeds: Sequence[int],
) -> None:
    """Adds a run for each seed, entrant and point that the store has none of.

    After the first seed only those run who may lead; most of the time would go to the others.
    """
    for seed in seeds:
        draw = workload.draw(seed)
        for entrant in entrants:
            for point in points:
                key = {"seed": seed, "side": entrant.side, "rule": entrant.name, "point": point}
                if store.has("runs", **key):
                    continue
                if seed != seeds[0] and not may_lead(store, entrant, point, seeds[0]):
                    continue
                found = measured(workload, entrant, draw, point)
                store.add("runs", {**key, **found})
                print(_line(workload.name, key, found), file=sys.stderr, flush=True)


def may_lead(store: Store, entrant: Entrant, point: float, seed: int) -> bool:
    """Whether an entrant was near the best of its kind at a seed, in a stage; `COLUMNS` always may."""
    if entrant.name in COLUMNS:
        return True
    behind = OURS_BEHIND if entrant.side == OURS else BEHIND
    runs = [r for r in store.content["runs"] if (r["seed"], r["point"]) == (seed, point) and "top1" in r]
    kind = [r for r in runs if (r["side"] == OURS) == (entrant.side == OURS)]
    mine = [r for r in kind if (r["side"], r["rule"]) == (entrant.side, entrant.name)]
    return any(
        100 * top1 >= 100 * max(r["top1"].get(stage, 0.0) for r in kind) - behind
        for run in mine
        for stage, top1 in run["top1"].items()
        if entrant.side != OURS or stage == REPAIRED
    )


def measured(workload: Workload, entrant: Entrant, draw: Draw, point: float) -> Run:
    """Cost, seconds and top-1 by stage; or under ``error`` what it failed with.

    Anyone's failure is a result: this goes through the night, and the tables show it.
    """
    try:
        with within(LIMIT_SECONDS):
            made = entrant.made(draw, point)
        final = list(made.stages.values())[-1]
        return {
            **workload.cost(final),
            "dense": workload.top1(workload.model),
            "top1": {stage: workload.top1(model) for stage, model in made.stages.items()},
            "seconds": made.seconds,
            **made.notes,
        }
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        return {"error": f"{type(error).__name__}: {first[:300]}"}


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Interrupts what takes longer, in processor time of this process.

    Raises:
        TimeoutError: It did.
    """

    def stop(*_: object) -> None:
        raise TimeoutError(f"more than {seconds:g} s of processor time")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _line(network: str, key: Run, found: Run) -> str:
    name = f"{network} seed {key['seed']} {key['side']} {key['rule']} at {key['point']}"
    if "error" in found:
        return f"{name}: {found['error']}"
    stages = ", ".join(f"{stage} {100 * value:.1f}" for stage, value in found["top1"].items())
    return f"{name}: {found['macs']:.3f} of the MACs, {stages}, {sum(found['seconds'].values()):.1f} s"
