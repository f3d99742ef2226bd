"""Random scores: the baseline for all other signals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from secateur.signals.blocks.signal import BlockSignal, BlockTally, Context, Need
from secateur.signals.named import drawn


@dataclass(frozen=True)
class BlockRandom(BlockSignal):
    """Uniform random numbers in [0, 1), by the run's seed and the group's name.

    Direction: none; higher is kept, as everywhere. Needs no data.
    """

    name: ClassVar[str] = "random"
    needs: ClassVar[frozenset[Need]] = frozenset()

    def start(self, context: Context) -> BlockTally:
        """Begin a run."""
        return _BlockRandomTally(context)


class _BlockRandomTally(BlockTally):
    def __init__(self, context: Context) -> None:
        self._context = context

    def finish(self) -> Mapping[str, NDArray[np.float64]]:
        return drawn(self._context.graph.groups, self._context.seed)
