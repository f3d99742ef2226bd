"""The mean absolute activation of a unit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from secateur.errors import SettingError
from secateur.graph.groups import Site
from secateur.signals.combine import Combine
from secateur.signals.observed import EntrySignal, EntryTally
from secateur.signals.signal import Context, Tally


@dataclass(frozen=True)
class Activation(EntrySignal):
    r"""Mean absolute activation of a unit, or its mean square.

    .. math:: A_j = \frac{1}{n M} \sum_{s=1}^n \sum_{m=1}^M \lvert a_{s,j,m} \rvert
              \qquad \text{or} \qquad \frac{1}{n M} \sum_s \sum_m a_{s,j,m}^2

    over n samples and the M numbers of the unit's map, behind the activation function where there is one,
    else behind the normalisation, else behind the layer. Several entries (gated halves, positions, the layers
    that add to one stream) are combined.

    Source: the mean activation is one of the criteria of Molchanov et al. 2017, arXiv 1611.06440. Departure:
    absolute values, since a large negative activation of a smooth activation function matters too; behind a
    ReLU that is the same.

    Direction: large means worth more. Needs no labels.

    Attributes:
        measure: ``mean`` of absolute values, or ``energy``, the mean square.
        combine: How several entries become one score, the largest by default; see `secateur.signals.combine`.

    Example:
        >>> import torch
        >>> import secateur as sc
        >>> net = torch.nn.Sequential(torch.nn.Linear(1, 3, bias=False), torch.nn.Linear(3, 2, bias=False))
        >>> _ = net[0].weight.data.copy_(torch.tensor([[1.0], [2.0], [3.0]]))
        >>> _ = net[1].weight.data.copy_(torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]]))
        >>> graph = sc.trace(net, torch.zeros(2, 1))
        >>> data = [(torch.ones(4, 1), torch.tensor([0, 0, 1, 1]))]
        >>> sc.score(graph, data, sc.signals.Activation(), progress=False)["activation"]["0"]
        array([1., 2., 3.])
    """

    measure: Literal["mean", "energy"] = "mean"
    combine: Combine = "max"

    name: ClassVar[str] = "activation"

    def __post_init__(self) -> None:
        """Check the settings."""
        if self.measure not in ("mean", "energy"):
            raise SettingError(
                f"activation: expected measure to be mean or energy, got {self.measure!r}. Name one."
            )
        super().__post_init__()

    def start(self, context: Context) -> Tally:
        """Begin a run."""
        return _ActivationTally(self, context)


class _ActivationTally(EntryTally):
    def __init__(self, signal: Activation, context: Context) -> None:
        super().__init__(signal, context, signal.combine)
        self._squared = signal.measure == "energy"

    def measure(self, value: Tensor, site: Site) -> Tensor:
        size = value.square() if self._squared else value.abs()
        return size.mean(2, dtype=torch.float64)
