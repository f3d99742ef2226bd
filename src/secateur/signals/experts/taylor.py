"""How sensitive the loss is to an expert's weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from secateur.signals.experts.signal import Context, ExpertSignal, ExpertTally, Need
from secateur.targets.experts.blocks import Block


@dataclass(frozen=True)
class ExpertTaylor(ExpertSignal):
    r"""The first-order change of the loss when the expert's weights become zero.

    .. math:: \Big\lvert \sum_b \sum_{w \in e} w \, \frac{\partial L_b}{\partial w} \Big\rvert

    over batches b and all of the expert's weights and biases. The R-Score of FAIR-Pruner (arXiv 2508.02291)
    with an expert as the unit. It needs a loss: a mapping batch with labels, for example.

    Direction: large means that the task is sensitive to the expert, so that it is to be protected.
    """

    name: ClassVar[str] = "expert_taylor"
    needs: ClassVar[frozenset[Need]] = frozenset({"gradients"})

    def start(self, context: Context) -> ExpertTally:
        """Begin a run."""
        return _ExpertTaylorTally(context)


class _ExpertTaylorTally(ExpertTally):
    def __init__(self, context: Context) -> None:
        self._sums = context.zeros()

    def gradient(self, block: Block, number: int | None, weight: Tensor, gradient: Tensor) -> None:
        product = weight.detach().double() * gradient.double()
        if number is None:
            self._sums[block.name] += product.flatten(1).sum(1)
        else:
            self._sums[block.name][number] += product.sum()

    def finish(self) -> Mapping[str, NDArray[np.float64]]:
        return {name: sums.abs().cpu().numpy() for name, sums in self._sums.items()}
