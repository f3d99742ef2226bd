"""Random scores: the baseline for all other signals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from secateur.signals.experts.signal import Context, ExpertSignal, ExpertTally, Need
from secateur.signals.named import drawn


@dataclass(frozen=True)
class ExpertRandom(ExpertSignal):
    """Uniform random numbers in [0, 1), by the run's seed and the block's name.

    Direction: none; higher is kept, as everywhere. Needs no data.
    """

    name: ClassVar[str] = "random"
    needs: ClassVar[frozenset[Need]] = frozenset()

    def start(self, context: Context) -> ExpertTally:
        """Begin a run."""
        return _ExpertRandomTally(context)


class _ExpertRandomTally(ExpertTally):
    def __init__(self, context: Context) -> None:
        self._context = context

    def finish(self) -> Mapping[str, NDArray[np.float64]]:
        return drawn(self._context.graph.groups, self._context.seed)
