"""The same short fine-tuning from every start, and speed-ups: ours, `auto` and the best peers, at one point.

A peer's network gets the record that `sc.recover` asks for by applying a plan that removes nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from time import process_time
from typing import Any

from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import secateur as sc
from benchmarks import cifar
from benchmarks.frontier.entrant import Entrant
from benchmarks.frontier.store import Store
from benchmarks.frontier.summary import OURS, contest, rows
from benchmarks.frontier.workload import Draw, Workload

EPOCHS, IMAGES, BATCH = 2, 10_000, 128
TIMED = 32
"""Images in a pass whose time is compared with the dense network's."""


def tune(
    workload: Workload,
    store: Store,
    entrants: Sequence[Entrant],
    point: float,
    seed: int = 0,
    images: int = IMAGES,
    epochs: int = EPOCHS,
) -> None:
    """Adds before and after for every start that the store has none of.

    Who is tuned follows from the runs that the store has at this point: the best single rule of ours, `auto`,
    and the best peer as it comes and with batch norms re-estimated.
    """
    leaders = contest(rows(store.content), point).all()
    starts: dict[tuple[str, str], list[str]] = {}
    for row in leaders:
        starts.setdefault((row.side, row.rule), []).append(row.stage)
    if not starts:
        print(f"{workload.name}: nothing was run at {point}: nothing to tune.", file=sys.stderr)
        return
    draw = workload.draw(seed)
    loader = DataLoader(TensorDataset(*cifar.load("train", images)), BATCH, shuffle=True, drop_last=True)
    for entrant in entrants:
        stages = starts.get((entrant.side, entrant.name), [])
        key = {"seed": seed, "side": entrant.side, "rule": entrant.name, "point": point}
        settings = {"epochs": epochs, "images": images}
        missing = [s for s in stages if not store.has("tuned", **key, **settings, start=s)]
        made = entrant.made(draw, point).stages if missing else {}
        for start in missing:
            run = _tuned(workload, made[start], draw, entrant.side, loader, epochs)
            store.add("tuned", {**key, **settings, "start": start, **run})
            print({**key, "start": start, **run}, file=sys.stderr, flush=True)


def recorded(model: nn.Module, draw: Draw, side: str) -> nn.Module:
    """A network that `sc.recover` takes: ours as it is, another after a plan that removes nothing."""
    if side == OURS:
        return model
    example = draw.labelled[0][0][:2]
    graph = sc.trace(model, example)
    scores = sc.score(graph, None, "magnitude", progress=False)
    plan = sc.Uniform(ratio=0.0).allocate(graph, scores)
    copied: nn.Module = sc.apply(model, plan, graph=graph, example_inputs=example).eval()
    return copied


def _tuned(
    workload: Workload, model: nn.Module, draw: Draw, side: str, loader: Any, epochs: int
) -> dict[str, Any]:
    """Top-1 before and after, the seconds, and the speed-up; or under ``error`` what it failed with."""
    begun = process_time()
    try:
        start = recorded(model, draw, side)
        tuned = sc.recover(start, workload.model, loader, epochs=epochs, seed=draw.seed, progress=False)
    except Exception as error:  # a peer's network need not be one that can be captured
        return {"error": f"{type(error).__name__}: {str(error)[:300]}"}
    seconds = process_time() - begun
    images = workload.test[0][:TIMED]
    (row,) = sc.bench(workload.model, tuned, images, batches=(TIMED,)).rows
    return {
        "before": workload.top1(model),
        "after": workload.top1(tuned.eval()),
        "seconds": seconds,
        "speedup": [row.speedup.value, row.speedup.low, row.speedup.high],
    }
