"""How long calls take, against each other."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from secateur.collecting import uncollected
from secateur.models import evaluating


@dataclass(frozen=True)
class Latency:
    """Measured seconds of one forward pass.

    Attributes:
        seconds: Every counted run.
        batch: Samples in one pass (the length of the first input's first axis).
    """

    seconds: tuple[float, ...]
    batch: int

    @property
    def median(self) -> float:
        """The middle run, in seconds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> tuple[float, float]:
        """The first and the third quartile, in seconds."""
        ordered = sorted(self.seconds)
        return ordered[len(ordered) // 4], ordered[(3 * len(ordered)) // 4]


def latency(
    models: Sequence[nn.Module],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    runs: int = 20,
    warmup: int = 3,
) -> tuple[Latency, ...]:
    """Time models against each other: interleaved, so that a drifting machine slows all alike.

    Args:
        models: Timed in turn, A B A B ..., in evaluation mode and without gradients.
        args: Positional inputs, on the models' device.
        kwargs: Keyword inputs.
        runs: Counted rounds.
        warmup: Rounds that are not counted.

    Returns:
        A measurement for each model.

    Example:
        >>> import torch
        >>> import secateur as sc
        >>> _ = torch.manual_seed(0)
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)).eval()
        >>> graph = sc.trace(net, torch.zeros(2, 4))
        >>> plan = sc.Uniform(ratio=0.25).allocate(graph, sc.score(graph, None, "magnitude"))
        >>> small = sc.apply(net, plan)
        >>> dense, pruned = sc.latency([net, small], (torch.zeros(2, 4),), runs=5)
        >>> len(dense.seconds), pruned.batch
        (5, 2)
    """
    named = dict(kwargs or {})

    def call(model: nn.Module) -> Callable[[], object]:
        return lambda: model(*args, **named)

    with ExitStack() as modes, torch.no_grad():
        for model in models:
            modes.enter_context(evaluating(model, fast_path=True))
        seconds = interleaved([call(m) for m in models], runs, warmup, waiting((args, named)))
    batch = next((v.shape[0] for v in _tensors((args, named)) if v.ndim), 1)
    return tuple(Latency(times, batch) for times in seconds)


def interleaved(
    calls: Sequence[Callable[[], object]], rounds: int, warmup: int, wait: Callable[[], None]
) -> list[tuple[float, ...]]:
    """Seconds of each call in each counted round. [calls][rounds]

    Args:
        calls: Made in turn, A B A B ....
        rounds: How many rounds count.
        warmup: Rounds before them.
        wait: Returns when the device is done.
    """
    seconds: list[list[float]] = [[] for _ in calls]
    with uncollected(), flushed_subnormals():
        for turn in range(warmup + rounds):
            for call, times in zip(calls, seconds, strict=True):
                wait()
                start = time.perf_counter()
                call()
                wait()
                if turn >= warmup:
                    times.append(time.perf_counter() - start)
    return [tuple(times) for times in seconds]


def waiting(arguments: Any) -> Callable[[], None]:
    """What waits for the device that these inputs live on."""
    return torch.cuda.synchronize if any(t.is_cuda for t in _tensors(arguments)) else lambda: None


@contextmanager
def restored_subnormals() -> Iterator[None]:
    """What this thread makes of numbers below the smallest normal one is afterwards as it was before."""
    smallest = torch.finfo(torch.float32).tiny
    were = bool((torch.tensor(smallest) * 0.5).item() == 0)
    try:
        yield
    finally:
        torch.set_flush_denormal(were)


@contextmanager
def flushed_subnormals() -> Iterator[None]:
    """Inside, this thread takes numbers below the smallest normal one as zero; restored afterwards.

    Processors compute with such numbers up to a hundred times slower. Pruned and repaired networks can meet
    more of them than the dense one, or fewer, which would be taken for a gain or a loss of pruning.
    """
    with restored_subnormals():
        torch.set_flush_denormal(True)
        yield


def _tensors(arguments: Any) -> list[torch.Tensor]:
    return [v for v in pytree.tree_leaves(arguments) if isinstance(v, torch.Tensor)]
