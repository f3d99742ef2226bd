"""How sensitive the loss is to what a block adds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from secateur.signals.blocks.signal import BlockSignal, BlockTally, Context, Need


@dataclass(frozen=True)
class BlockTaylor(BlockSignal):
    r"""The first-order change of the loss when the block adds nothing.

    .. math:: \Big\lvert \sum_b \frac{\partial L_b}{\partial g} \Big\rvert_{g = 1}
              \quad\text{with}\quad y = x + g \, (y - x)

    over batches b, g being a factor on what the block adds to the stream. The R-Score of FAIR-Pruner (arXiv
    2508.02291) with a block as the unit. It needs a loss.

    Direction: large means that the task is sensitive to the block, so that it is to be protected.
    """

    name: ClassVar[str] = "block_taylor"
    needs: ClassVar[frozenset[Need]] = frozenset({"gradients"})

    def start(self, context: Context) -> BlockTally:
        """Begin a run."""
        return _BlockTaylorTally(context)


class _BlockTaylorTally(BlockTally):
    def __init__(self, context: Context) -> None:
        self._context = context
        self._sums: dict[str, float] = {}

    def gate(self, path: str, derivative: float) -> None:
        self._sums[path] = self._sums.get(path, 0.0) + derivative

    def finish(self) -> Mapping[str, NDArray[np.float64]]:
        return self._context.by_group({path: abs(value) for path, value in self._sums.items()})
