"""What a model costs: parameters and MACs by counting, latency and bytes by measuring."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from secateur.models import evaluating


@dataclass(frozen=True)
class Cost:
    """The analytic cost of one forward pass of one sample.

    Attributes:
        params: Parameters (buffers not counted; tied ones counted once).
        macs: Multiply-accumulate operations of convolutions, linear and recurrent layers and matrix
            products; half of what `torch.utils.flop_counter.FlopCounterMode` counts.
    """

    params: int
    macs: int


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


def weight_bytes(model: nn.Module) -> int:
    """Bytes that the parameters and buffers take in memory, shared storage counted once."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in model.state_dict().values()}
    return sum(storages.values())


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
    """
    first = next((a for a in (*args, *(kwargs or {}).values()) if isinstance(a, torch.Tensor)), None)
    wait: Callable[[], None] = torch.cuda.synchronize if first is not None and first.is_cuda else lambda: None
    seconds: list[list[float]] = [[] for _ in models]
    with ExitStack() as modes, torch.no_grad():
        for model in models:
            modes.enter_context(evaluating(model))
        for turn in range(warmup + runs):
            for model, times in zip(models, seconds, strict=True):
                wait()
                start = time.perf_counter()
                model(*args, **(kwargs or {}))
                wait()
                if turn >= warmup:
                    times.append(time.perf_counter() - start)
    batch = first.shape[0] if first is not None and first.ndim else 1
    return tuple(Latency(tuple(times), batch) for times in seconds)
