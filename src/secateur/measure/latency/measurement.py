"""The data of a timing of two models."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from secateur.measure.latency.interval import Interval
from secateur.measure.latency.timing import Latency


@dataclass(frozen=True)
class Row:
    """The timing of both models in one back end at one batch size.

    Attributes:
        backend: ``eager``, ``compile`` or ``onnxruntime``.
        batch: Samples in a forward pass.
        dense: Latency of the dense model.
        pruned: Latency of the pruned model, measured in the same rounds.
        speedup: Dense median divided by pruned median. Above 1, the pruned model is faster.
    """

    backend: str
    batch: int
    dense: Latency
    pruned: Latency
    speedup: Interval

    @property
    def verdict(self) -> str:
        """``faster``, ``slower``, or ``no gain`` where the interval includes 1."""
        if 1.0 in self.speedup:
            return "no gain"
        return "faster" if self.speedup.low > 1 else "slower"


@dataclass(frozen=True)
class Measurement:
    """The timings of two models in all back ends and batch sizes.

    Attributes:
        rows: One row for each back end and batch size.
        failed: Back ends that could not run both models, with the reason.
        reasons: Likely reasons why some rows show no gain; empty if all do.
        confidence: Confidence level of the intervals.
        rounds: Timed forward passes of each model.
        warmup: Forward passes before them that were not timed.
        threads: Threads that torch uses within an operator.
        device: The device of the models.
    """

    rows: tuple[Row, ...]
    failed: dict[str, str]
    reasons: tuple[str, ...]
    confidence: float
    rounds: int
    warmup: int
    threads: int
    device: str

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data, with the seconds of every pass."""
        found = asdict(self)
        for row, plain in zip(self.rows, found["rows"], strict=True):
            plain["verdict"] = row.verdict
        return found
