"""How often a unit is active."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from secateur.graph.groups import Site
from secateur.signals.combine import Combine
from secateur.signals.observed import EntrySignal, EntryTally
from secateur.signals.signal import Context, Tally


@dataclass(frozen=True)
class APoZ(EntrySignal):
    r"""Share of a unit's activations that are positive: 1 − the Average Percentage of Zeros.

    .. math:: P_j = \frac{1}{n M} \sum_{s=1}^n \sum_{m=1}^M [a_{s,j,m} > 0]

    over n samples and the M numbers of the unit's map, behind the activation function where there is one,
    else behind the normalisation, else behind the layer.

    Source: Hu et al. 2016, Network Trimming, arXiv 1607.03250. Departures: 1 − APoZ, so that higher is worth
    more; and what is not positive counts as zero. Behind a ReLU that is the same, and behind a GELU or SiLU,
    which are never exactly zero, it counts where a ReLU would be. Behind a sigmoid everything is positive,
    and the signal says nothing.

    Direction: large means active on more inputs, so worth more. Needs no labels.

    Attributes:
        combine: How several entries become one score; see `secateur.signals.combine`.

    Example:
        >>> import torch
        >>> import secateur as sc
        >>> net = torch.nn.Sequential(torch.nn.Linear(1, 3, bias=False), torch.nn.Linear(3, 2, bias=False))
        >>> _ = net[0].weight.data.copy_(torch.tensor([[1.0], [2.0], [3.0]]))
        >>> _ = net[1].weight.data.copy_(torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]]))
        >>> graph = sc.trace(net, torch.zeros(2, 1))
        >>> data = [torch.tensor([[1.0], [-1.0], [2.0], [3.0]])]
        >>> sc.score(graph, data, sc.signals.APoZ(), progress=False)["apoz"]["0"]
        array([0.75, 0.75, 0.75])
    """

    combine: Combine = "mean"

    name: ClassVar[str] = "apoz"

    def start(self, context: Context) -> Tally:
        """Begin a run."""
        return _APoZTally(self, context, self.combine)


class _APoZTally(EntryTally):
    def measure(self, value: Tensor, site: Site) -> Tensor:
        return (value > 0).double().mean(2)
