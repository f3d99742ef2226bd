"""Time several calls against each other, in turn."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from secateur.common.collecting import uncollected
from secateur.common.models import evaluating
from secateur.common.precision import as_called

LEAST = 5
"""The fewest timed rounds, if time is limited: quartiles need some."""


@dataclass(frozen=True)
class Latency:
    """Measured seconds of one forward pass.

    Attributes:
        seconds: The time of every counted pass. [s]
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
    seconds: float = math.inf,
) -> tuple[Latency, ...]:
    """Time models against each other. They run in turn, so a machine that slows down slows all of them.

    Args:
        models: The models, timed in the order A B A B ..., in evaluation mode and without gradients.
        args: Positional inputs, on the models' device.
        kwargs: Keyword inputs.
        runs: Timed rounds. Each model runs once in a round.
        warmup: Rounds before them that are not timed.
        seconds: Time that all rounds may take, as far as the first one tells. At least five are timed.

    Returns:
        The latency of each model, in the order of `models`.

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
        times = interleaved([call(m) for m in models], runs, warmup, stopwatch((args, named)), seconds)
    batch = next((v.shape[0] for v in _tensors((args, named)) if v.ndim), 1)
    return tuple(Latency(each, batch) for each in times)


def interleaved(
    calls: Sequence[Callable[[], object]],
    rounds: int,
    warmup: int,
    seconds_of: Callable[[Callable[[], object]], float],
    most: float = math.inf,
) -> list[tuple[float, ...]]:
    """Time calls in turn, A B A B ..., and return the seconds of each. [calls][rounds]

    Args:
        calls: The functions to time.
        rounds: Timed rounds.
        warmup: Rounds before them that are not timed.
        seconds_of: Makes a call and returns how long it took; see `stopwatch`.
        most: Seconds that all rounds may take, as far as the first one tells; at least `LEAST` are timed.
    """
    seconds: list[list[float]] = [[] for _ in calls]
    turn, end = 0, warmup + rounds
    with as_called(), uncollected(), flushed_subnormals():
        while turn < end:
            took = [seconds_of(call) for call in calls]
            if turn == 0 and sum(took) * end > most:  # one slow round is warm enough
                warmup, end = 1, 1 + min(rounds, max(LEAST, int(most / sum(took))))
            if turn >= warmup:
                for times, each in zip(seconds, took, strict=True):
                    times.append(each)
            turn += 1
    return [tuple(times) for times in seconds]


def stopwatch(arguments: Any) -> Callable[[Callable[[], object]], float]:
    """Return what times a call with these inputs: the clock, or for inputs on CUDA the device's events."""
    return _by_events if any(t.is_cuda for t in _tensors(arguments)) else _by_clock


def _by_clock(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _by_events(call: Callable[[], object]) -> float:
    """From when the device is idle to when it has finished all that the call asked of it."""
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


@contextmanager
def restored_subnormals() -> Iterator[None]:
    """Restore after the block whether this thread flushes subnormal numbers to zero."""
    # torch can set the mode but not read it. Halving the smallest normal number shows it.
    smallest = torch.finfo(torch.float32).tiny
    were = bool((torch.tensor(smallest) * 0.5).item() == 0)
    try:
        yield
    finally:
        torch.set_flush_denormal(were)


@contextmanager
def flushed_subnormals() -> Iterator[None]:
    """Flush subnormal numbers (below the smallest normal one) to zero in this thread, inside the block.

    CPUs are up to a hundred times slower with subnormal numbers. A pruned network can meet more or fewer of
    them than the dense one, and the timing would show this as a loss or gain of pruning.
    """
    with restored_subnormals():
        torch.set_flush_denormal(True)
        yield


def _tensors(arguments: Any) -> list[torch.Tensor]:
    return [v for v in pytree.tree_leaves(arguments) if isinstance(v, torch.Tensor)]
