"""Bounds on latency and memory: measure what a pruned model takes, and compare it with the bound."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import nn

from secateur.allocators import Budget
from secateur.allocators.amounts import seconds_of, share_of
from secateur.calibration import Batch
from secateur.common.computing import device_named
from secateur.common.formatting import milliseconds, percent
from secateur.common.models import device_of
from secateur.graph.inputs import Arguments, batch_size, call_arguments, samples_of
from secateur.measure.latency.backends import BACKENDS
from secateur.measure.latency.interval import Interval, median_ratio
from secateur.measure.latency.timing import interleaved, stopwatch
from secateur.measure.memory import memory
from secateur.signals.memory import in_bytes
from secateur.targets.units.copying import duplicate

ROUNDS, WARMUP = 30, 3
"""Number of timed forward passes, and of untimed ones before them."""


class MeasuredBound(ABC):
    """A bound on a quantity that is measured by running models.

    Attributes:
        name: The field of `Budget`.
        relative: Whether measured values and the limit are shares of the dense model's value.
        limit: The largest allowed value: a share, or in the quantity's unit (seconds, bytes).
    """

    name: ClassVar[str]

    def __init__(self, budget: Budget, dense: nn.Module, example: Batch) -> None:
        """Prepare the inputs and the dense model; nothing is measured yet."""
        self._budget, self._device = budget, budget.device
        bound = getattr(budget, self.name)
        self.relative = share_of(bound) is not None
        self.limit: float = share_of(bound) or self._absolute(bound)
        args, kwargs = call_arguments(example.inputs, device_of(dense))
        own = batch_size((args, kwargs))
        if budget.batch is not None and own:
            args, kwargs = samples_of((args, kwargs), [i % own for i in range(budget.batch)])
        there = None if self._device is None else _device_named(self._device)
        self._inputs: Arguments = call_arguments(kwargs or args, there)
        self._dense = self._on_its_device(dense)

    def _on_its_device(self, model: nn.Module) -> nn.Module:
        """Return the model on the device where it is measured. It is a copy if the model is elsewhere."""
        if self._device is None or device_of(model) == _device_named(self._device):
            return model
        return duplicate(model).to(self._device)

    @abstractmethod
    def _absolute(self, bound: Any) -> float:
        """Convert a bound that is no share to seconds or bytes."""

    @abstractmethod
    def __call__(self, small: nn.Module) -> Interval:
        """Measure a pruned model. It meets the bound if the interval's upper end is at most the limit."""

    @property
    @abstractmethod
    def dense(self) -> float:
        """The dense model's value; 1 if values are relative."""

    @abstractmethod
    def shown(self, value: float) -> str:
        """Format a value with its unit."""

    @abstractmethod
    def advice(self, value: float) -> str:
        """Say which bound a model with this value would meet, as the end of an error message."""

    def guess(self) -> float:
        """Return the share of the cost to try first."""
        return self.limit if self.relative else self.limit / max(self.dense, 1e-9)


class Latency(MeasuredBound):
    """A bound on the seconds of a forward pass, in one of `BACKENDS`."""

    name = "latency"

    def _absolute(self, bound: Any) -> float:
        return seconds_of(bound) or 0.0

    def times(self, *models: nn.Module) -> list[tuple[float, ...]]:
        """Time models in turn, and return the seconds of each pass. [models][rounds]"""
        args, kwargs = self._inputs
        with BACKENDS[self._budget.backend](models, args, kwargs) as calls:
            return interleaved(calls, ROUNDS, WARMUP, stopwatch((args, kwargs)))

    def __call__(self, small: nn.Module) -> Interval:
        """Time the model in turn with the dense one; alone, if the limit is in seconds."""
        small = self._on_its_device(small)
        if not self.relative:
            (times,) = self.times(small)
            return median_ratio(times, [1.0] * len(times))
        whole, part = self.times(self._dense, small)
        return median_ratio(part, whole)

    @property
    def dense(self) -> float:
        """Median seconds of the dense model; 1 if values are relative."""
        if self.relative:
            return 1.0
        (times,) = self.times(self._dense)
        return median_ratio(times, [1.0] * len(times)).value

    def shown(self, value: float) -> str:
        """Format a time, or a share of the dense latency."""
        where = "" if self._budget.backend == "eager" else f" in {self._budget.backend}"
        found = f"{percent(value, 1)} of the dense latency" if self.relative else milliseconds(value)
        return found + where

    def advice(self, value: float) -> str:
        """Advise a larger bound, larger batches, or a bound on MACs."""
        asked = f"{math.ceil(value * 100) / 100:g}" if self.relative else f"'{1e3 * value:.4g} ms'"
        return f"latency={asked}, give larger batches, or bound MACs instead"


class Memory(MeasuredBound):
    """A bound on the bytes that a model takes; see `secateur.measure.memory`."""

    name = "memory"

    def __init__(self, budget: Budget, dense: nn.Module, example: Batch) -> None:
        super().__init__(budget, dense, example)
        self._whole = self._bytes(dense)

    def _absolute(self, bound: Any) -> float:
        return float(in_bytes(bound))

    def _bytes(self, model: nn.Module) -> int:
        args, kwargs = self._inputs
        return memory(self._on_its_device(model), args, kwargs, tokens=self._budget.tokens).total

    def __call__(self, small: nn.Module) -> Interval:
        """Count the bytes. The result is exact, so the interval has no width."""
        value = self._bytes(small) / (self._whole if self.relative else 1)
        return Interval(value, value, value)

    @property
    def dense(self) -> float:
        """Bytes of the dense model; 1 if values are relative."""
        return 1.0 if self.relative else float(self._whole)

    def shown(self, value: float) -> str:
        """Format megabytes, or a share of the dense model's bytes."""
        return f"{percent(value, 1)} of the dense memory" if self.relative else f"{value / 1e6:,.4g} MB"

    def advice(self, value: float) -> str:
        """Advise a larger bound, or a smaller batch."""
        asked = f"{math.ceil(value * 1e3) / 1e3:g}" if self.relative else str(round(value))
        return f"memory={asked}, or measure a smaller batch"


MEASURED_BOUNDS: dict[str, type[MeasuredBound]] = {"latency": Latency, "memory": Memory}


def measured_bounds_of(budget: Budget, dense: nn.Module, example: Batch) -> tuple[MeasuredBound, ...]:
    """Return the budget's bounds on latency and memory."""
    return tuple(
        kind(budget, dense, example) for name, kind in MEASURED_BOUNDS.items() if name in budget.measured
    )


def _device_named(device: str) -> torch.device:
    return device_named(device, f"budget(device={device!r})", "Leave it out to measure where the model is.")
