"""What a measurement of two models holds."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from secateur.latency.interval import Interval
from secateur.latency.timing import Latency


@dataclass(frozen=True)
class Row:
    """Both models in one back end at one batch size.

    Attributes:
        backend: ``eager``, ``compile`` or ``onnxruntime``.
        batch: Samples in a pass.
        dense: Seconds of the dense model.
        pruned: Seconds of the pruned model, in the same rounds.
        speedup: Dense over pruned: above 1, the pruned model is faster.
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
    """What was measured, as data.

    Attributes:
        rows: A row for each back end and batch size.
        failed: Back ends that could not run both models, with the reason.
        reasons: Where some row has no gain: why, as far as the models and the figures show.
        confidence: Of the intervals.
        rounds: Counted passes of each model.
        warmup: Passes before them.
        threads: Threads within an operator.
        device: Where the models live.
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
        """Plain data, every run included."""
        found = asdict(self)
        for row, plain in zip(self.rows, found["rows"], strict=True):
            plain["verdict"] = row.verdict
        return found
