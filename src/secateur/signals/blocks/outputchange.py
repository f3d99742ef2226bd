"""How much the model's outputs change when a block alone is bypassed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from secateur.signals.blocks.signal import BlockSignal, BlockTally, Context, Need, Quotient


@dataclass(frozen=True)
class BlockOutputChange(BlockSignal):
    r"""The squared distance of the model's outputs with the block bypassed, relative to their square.

    .. math:: \frac{\sum_i \lVert f(x_i) - f_{-b}(x_i) \rVert^2}{\sum_i \lVert f(x_i) \rVert^2}

    It costs a forward pass for each block, and is what a repair of one block would start from. It needs no
    labels. Errors of several blocks do not add: take several rounds (``steps``) where many go.

    Direction: higher is worth more.
    """

    name: ClassVar[str] = "output_change"
    needs: ClassVar[frozenset[Need]] = frozenset({"outputs"})

    def start(self, context: Context) -> BlockTally:
        """Begin a run."""
        return _OutputChangeTally(context)


class _OutputChangeTally(Quotient):
    def output(self, path: str, change: float, size: float) -> None:
        self.add(path, change, size)
