"""How large a block's weights are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from secateur.signals.blocks.signal import BlockSignal, BlockTally, Context, Need


@dataclass(frozen=True)
class BlockMagnitude(BlockSignal):
    r"""The L2 norm of all of the block's weights and biases, :math:`\sqrt{\sum_{w \in b} w^2}`.

    Needs no data. Direction: higher is worth more.
    """

    name: ClassVar[str] = "magnitude"
    needs: ClassVar[frozenset[Need]] = frozenset()

    def start(self, context: Context) -> BlockTally:
        """Begin a run."""
        return _BlockMagnitudeTally(context)


class _BlockMagnitudeTally(BlockTally):
    def __init__(self, context: Context) -> None:
        self._context = context

    def finish(self) -> Mapping[str, NDArray[np.float64]]:
        model = self._context.model
        return self._context.by_group(
            {
                block.path: sum(
                    float(p.detach().double().square().sum())
                    for p in model.get_submodule(block.path).parameters()
                )
                ** 0.5
                for block in self._context.graph.all_blocks()
            }
        )
