"""How far a block moves the stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from secateur.signals.blocks.signal import BlockSignal, BlockTally, Context, Need, Quotient


@dataclass(frozen=True)
class StreamDistance(BlockSignal):
    r"""The square of what the block adds, relative to the square of what it gives.

    .. math:: \frac{\sum_t \lVert y_t - x_t \rVert^2}{\sum_t \lVert y_t \rVert^2}

    over positions t, x being what the block reads and y what it gives.

    Direction: higher is worth more.
    """

    name: ClassVar[str] = "stream_distance"
    needs: ClassVar[frozenset[Need]] = frozenset({"streams"})

    def start(self, context: Context) -> BlockTally:
        """Begin a run."""
        return _StreamDistanceTally(context)


class _StreamDistanceTally(Quotient):
    def stream(self, path: str, before: Tensor, after: Tensor) -> None:
        x, y = before.double(), after.double()
        self.add(path, float((y - x).square().sum()), float(y.square().sum()))
