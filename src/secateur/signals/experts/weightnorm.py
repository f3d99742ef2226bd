"""How large an expert's weights are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from secateur.signals.experts.signal import Context, ExpertSignal, ExpertTally, Need
from secateur.targets.experts.graph import expert_parameters


@dataclass(frozen=True)
class WeightNorm(ExpertSignal):
    r"""The L2 norm of all of the expert's weights and biases, :math:`\sqrt{\sum_{w \in e} w^2}`.

    Needs no data. Direction: higher is worth more.
    """

    name: ClassVar[str] = "weight_norm"
    needs: ClassVar[frozenset[Need]] = frozenset()

    def start(self, context: Context) -> ExpertTally:
        """Begin a run."""
        return _WeightNormTally(context)


class _WeightNormTally(ExpertTally):
    def __init__(self, context: Context) -> None:
        self._context = context

    def finish(self) -> Mapping[str, NDArray[np.float64]]:
        sums = self._context.zeros()
        for block in self._context.graph.blocks:
            for _, weight, number in expert_parameters(self._context.model, block):
                if number is None:
                    sums[block.name] += weight.detach().double().square().flatten(1).sum(1)
                else:
                    sums[block.name][number] += weight.detach().double().square().sum()
        return {name: total.sqrt().cpu().numpy() for name, total in sums.items()}
