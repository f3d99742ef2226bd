"""How much a block turns the stream: Block Influence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from secateur.signals.blocks.signal import BlockSignal, BlockTally, Context, Need, Quotient


@dataclass(frozen=True)
class StreamChange(BlockSignal):
    r"""One minus the cosine between what the block reads and what it gives, the mean over positions.

    .. math:: 1 - \frac{1}{T} \sum_t \frac{x_t^\top y_t}{\lVert x_t \rVert \lVert y_t \rVert}

    A position is a token; where the stream is a map, it is a whole sample.

    Source: Men et al. 2024, ShortGPT, arXiv 2403.03853, Block Influence.

    Direction: a block that leaves the stream's direction as it was is worth 0.
    """

    name: ClassVar[str] = "stream_change"
    needs: ClassVar[frozenset[Need]] = frozenset({"streams"})

    def start(self, context: Context) -> BlockTally:
        """Begin a run."""
        return _StreamChangeTally(context)


class _StreamChangeTally(Quotient):
    def stream(self, path: str, before: Tensor, after: Tensor) -> None:
        cosine = F.cosine_similarity(before.double(), after.double(), dim=1)
        self.add(path, float((1 - cosine).clamp_min(0).sum()), len(cosine))
