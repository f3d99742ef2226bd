"""How sensitive the task is to a unit: the R-Score of FAIR-Pruner."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from secateur.signals.by_unit import producers, sum_by_unit
from secateur.signals.signal import Context, Need, Signal, Step, SumTally, Tally, Vector


@dataclass(frozen=True)
class Taylor(Signal):
    r"""First-order change of the loss when a unit's producing weights go to zero.

    .. math:: R_j = \frac{1}{n} \Bigl| \sum_b n_b \sum_{w \in W_j} w \, \frac{\partial L_b}{\partial w} \Bigr|

    where W_j are the weights and biases that produce unit j (normalisation is not among them), L_b is the
    mean loss of batch b, and n_b its number of samples.

    Source: FAIR-Pruner, arXiv 2508.02291. Departure: the paper adds up the batches' mean losses; weighting
    each by its samples and dividing by their number n makes the score independent of how samples are cut
    into batches. For equal batches the two differ by a common factor, hence not in their ranks.

    Direction: large means that the task is sensitive to the unit, so it is to be protected.

    Example:
        >>> import torch
        >>> import secateur as sc
        >>> net = torch.nn.Sequential(torch.nn.Linear(1, 3, bias=False), torch.nn.Linear(3, 2, bias=False))
        >>> _ = net[0].weight.data.copy_(torch.tensor([[1.0], [2.0], [3.0]]))
        >>> _ = net[1].weight.data.copy_(torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]]))
        >>> graph = sc.trace(net, torch.zeros(2, 1))
        >>> data = [(torch.ones(4, 1), torch.tensor([0, 0, 0, 1]))]
        >>> sc.score(graph, data, sc.signals.Taylor(), progress=False)["taylor"]["0"].round(3)
        array([0.631, 0.   , 1.892])
    """

    name: ClassVar[str] = "taylor"
    needs: ClassVar[frozenset[Need]] = frozenset({"weights", "gradients"})

    def start(self, context: Context) -> Tally:
        """Begin a run."""
        return _TaylorTally(context)


class _TaylorTally(SumTally):
    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._made = producers(context.graph)

    def gradients(self, gradients: Mapping[str, Tensor], step: Step) -> None:
        for name, pieces in self._made.items():
            if name in gradients:
                product = self.context.tensors[name].detach().double() * gradients[name].double()
                for group, piece in pieces:
                    self.sums[group.name] += step.size * sum_by_unit(product, piece, group.size)

    def finish(self) -> Mapping[str, Vector]:
        return {name: np.abs(total) / self.samples for name, total in self.sums.items()}
