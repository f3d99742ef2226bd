"""How much the input features of the layers that read a unit vary: the signal of FLAP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from secateur.signals.units.input_features import Features, FeatureSignal


@dataclass(frozen=True)
class Fluctuation(FeatureSignal):
    r"""Variance of a unit's input features, times the squared weights that read them.

    .. math:: F_j = \sum_{c \in j} \Bigl[ \frac{1}{N - 1} \sum_{n=1}^N (x_{n,c} - \bar x_c)^2 \Bigr]
              \sum_i w_{i,c}^2

    over the input features c of unit j in the layers that read it, and the N positions of all samples: tokens
    of a text, pixels of a map. What does not vary can be put into a bias when it is removed: the repair
    ``bias`` does it. FLAP's rule is this signal with one threshold for all groups, after each group's scores
    were standardised: ``sc.Global(removal="fluctuation", normalise="zscore")``.

    Source: An et al. 2023, Fluctuation-based Adaptive Structured Pruning (FLAP), arXiv 2312.11983, its metric
    WIFV. Departures: units of any network, not only the heads and neurons of a language model; a feature of a
    convolution is an input channel at one place of the kernel; several layers that read a unit add up.

    Direction: large means that a constant cannot replace the unit, so worth more. Needs no labels.

    Example:
        >>> import torch
        >>> import secateur as sc
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 1, bias=False))
        >>> _ = net[0].weight.data.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        >>> _ = net[1].weight.data.copy_(torch.tensor([[3.0, 1.0]]))
        >>> graph = sc.trace(net, torch.zeros(2, 2))
        >>> data = [torch.tensor([[5.0, 0.0], [5.0, 2.0]])]  # the first feature is large, and constant
        >>> sc.score(graph, data, "fluctuation", progress=False)["fluctuation"]["0"]
        array([0., 2.])
    """

    name: ClassVar[str] = "fluctuation"

    @staticmethod
    def worth(features: Features) -> Tensor:
        """The variance of each feature times its squared weights."""
        variance = (features.square - features.mean.square()).clamp_min(0)
        n = features.count
        return variance * (n / max(n - 1, 1)) * features.weight.square().sum(1)
