"""What the processes of a process group do, for test_distributed.py: every case, one after the other."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import secateur as sc
from secateur.graph.graph import Graph
from secateur.graph.trace import trace
from secateur.signals import Scores, Wasserstein, score
from secateur.signals.registry import SIGNALS
from tests.helpers.models import build
from tests.signals.data import labelled

SIZES = (5, 3, 6, 1, 4, 7, 2)  # seven batches: shares differ in length for two and for three processes
MEMORY = 9_000  # bytes; not enough for all groups at once, with two or three processes
TWO = (Wasserstein(projections=3, per_class=4), "taylor")
ALL = (*TWO, *(name for name in SIGNALS if name not in ("wasserstein", "taylor")))
LIGHT = tuple(  # each of the others alone needs more than MEMORY
    signal for signal in ALL if signal not in ("reconstruction", "fluctuation", "wanda")
)


class Failing:
    """Batches, until this process has read so many of them, over all passes."""

    def __init__(self, data: list[Any], rank: int, count: int) -> None:
        self.data, self.rank, self.left = data, rank, count

    def __iter__(self) -> Iterator[Any]:
        for batch in self.data:
            if self.left == 0 and dist.get_rank() == self.rank:
                raise OSError("disk on fire")
            self.left -= 1
            yield batch

    def __len__(self) -> int:
        return len(self.data)


def said(task: Callable[[], Any]) -> str:
    try:
        task()
    except (Exception, KeyboardInterrupt) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


@cache
def plain() -> tuple[Graph, list[tuple[Tensor, Tensor]]]:
    data = labelled("plain", SIZES)
    return trace(build("plain"), data[0][0]), data


@cache
def pruned() -> str:
    data = labelled("mlp", SIZES)
    result = sc.prune(
        build("mlp"), data, sc.Budget(macs=0.6), repair=None, measure_latency=False, progress=False
    )
    return result.plan.to_json()


@cache
def smaller() -> tuple[nn.Module, nn.Module]:
    """A model, and what is left of it."""
    graph, _ = plain()
    net = build("plain")
    plan = sc.Uniform(ratio=0.4, removal="magnitude").allocate(graph, score(graph, None, "magnitude"))
    return net, sc.apply(net, plan, graph=graph)


def refitted_on(data: Any) -> None:
    """Repairs a model on some data."""
    (graph, _), (net, small) = plain(), smaller()
    sc.repair(small, net, data, ("reconstruct", "variance"), graph=graph, progress=False)


@cache
def refitted() -> list[list[float]]:
    """The tensors of a repaired model, one after another, for repairs that go through the layers in order."""
    (graph, data), (net, small) = plain(), smaller()
    return [
        torch.cat([t.flatten() for t in model.state_dict().values()]).tolist()
        for method in ("reconstruct", "variance")
        for model in [sc.repair(small, net, data, method, graph=graph, progress=False)]
    ]


def cases(folder: Path, initialised: bool) -> dict[str, Any]:
    """Results and errors of every case, as one process meets them."""
    if initialised:
        dist.init_process_group("gloo")
    graph, data = plain()
    found: dict[str, Any] = {"refitted": refitted()}
    results, runs = folder / "results", folder / "runs"
    for made in (results, runs):
        made.mkdir(exist_ok=True)

    def keep(what: str, scores: Scores) -> None:
        found[what] = scores.save(results / f"{what} {dist.get_rank()}")

    keep("all", score(graph, data, ALL))
    rank = dist.get_rank()
    keep("one batch", score(graph, data[:1], ALL))
    keep("memory", score(graph, data, LIGHT, memory=MEMORY))
    keep("weights", score(graph, data, "magnitude"))
    found["plan"] = pruned()

    damaged = [(x.clone(), y) for x, y in data]
    damaged[1][0][0] = torch.nan
    found["bad batch"] = said(lambda: score(graph, damaged))
    found["bad loader"] = said(lambda: score(graph, Failing(data, 1, 4)))
    nowhere = runs / "missing" / "run" if rank == 1 else runs / "unused"
    found["bad setting"] = said(lambda: score(graph, data, checkpoint=nowhere))
    found["one class"] = said(lambda: score(graph, [(x, y * 0) for x, y in data]))
    found["bad refit"] = [
        said(lambda n=n: refitted_on(Failing(data, 1, n * len(data) + 3))) for n in range(7)
    ]
    found["seeds"] = said(lambda: score(graph, data, seed=rank))
    rows = TensorDataset(*(torch.cat(part) for part in zip(*data, strict=True)))
    shares = DataLoader(rows, batch_size=4, sampler=DistributedSampler(rows))
    found["shared twice"] = said(lambda: score(graph, shares))

    path = runs / "run"
    # Once to count the classes, once for the first pass; it dies in the second.
    dying = Failing(data, 1, 2 * len(data) + 5)
    keeping: dict[str, Any] = {"memory": MEMORY, "checkpoint": path}
    found["killed"] = said(lambda: score(graph, dying, TWO, **keeping, checkpoint_every=0))
    dist.barrier()
    found["files"] = sorted(file.name for file in runs.iterdir())
    dist.barrier()
    if initialised and rank == 0:
        (runs / f"run.0of{dist.get_world_size()}").unlink()  # then all start anew
    keep("resumed", score(graph, data, TWO, **keeping))
    dist.barrier()
    found["files after"] = sorted(file.name for file in runs.iterdir())
    return found


class Deadly(list[Any]):
    """Batches, of which the fourth ends the second process."""

    def __iter__(self) -> Iterator[Any]:
        for index, batch in enumerate(super().__iter__()):
            if index == 3 and os.environ["RANK"] == "1":
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch


def abandoned() -> str:
    """What a process meets when another is killed."""
    graph, data = plain()
    return said(lambda: score(graph, Deadly(data), TWO))


class Troubled(list[Any]):
    """Batches, of which the fourth is trouble for the second process."""

    trouble = ""

    def __iter__(self) -> Iterator[Any]:
        for index, batch in enumerate(super().__iter__()):
            if index == 3 and os.environ["RANK"] == "1":
                if self.trouble == "stuck":
                    time.sleep(1000)
                elif self.trouble == "stopped":
                    os.kill(os.getpid(), signal.SIGSTOP)
                elif self.trouble == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                elif self.trouble == "raises":
                    raise OSError("disk on fire")
                elif self.trouble == "interrupted":
                    raise KeyboardInterrupt
            yield batch


def failing(what: str, call: str = "score") -> str:
    """What a process meets when the second one fails in some way."""
    graph, batches = plain()
    second = os.environ["RANK"] == "1"
    if second and what == "absent":
        return "nothing"
    data, net, signals = Troubled(batches), build("plain"), TWO
    data.trouble = what
    if second and what == "other weights":
        net = build("plain", seed=1)
        graph = trace(net, batches[0][0])
    elif second and what == "other setting":
        signals = (Wasserstein(projections=4, per_class=4), "taylor")
    elif second and what == "other data":
        data[0] = (data[0][0] + 1, data[0][1])
    elif second and what == "other layout":
        data[0] = tuple(part[:4] for part in data[0])
    elif second and what == "other data later":
        data[4] = (data[4][0] + 1, data[4][1])
    elif second and what == "one value is NaN":  # in a batch that the other process takes
        data[4] = (data[4][0].clone().index_fill_(0, torch.tensor(0), torch.nan), data[4][1])
    elif second and what == "more data":
        data.append(data[0])
    if call == "score":
        return said(lambda: score(graph, data, signals))
    if call == "prune":
        return said(lambda: sc.prune(net, data, sc.Budget(macs=0.6), measure_latency=False, progress=False))
    keep = {group.name: np.arange(group.size) > 0 for group in graph.groups}
    plan = sc.Plan.build(graph, keep, allocator="all but the first")
    return said(lambda: sc.repair(sc.apply(net, plan), net, data, progress=False))
