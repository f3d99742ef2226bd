"""Weights times the size of the input features that they multiply, for units: Wanda-sp."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from secateur.signals.units.input_features import Features, FeatureSignal


@dataclass(frozen=True)
class Wanda(FeatureSignal):
    r"""Absolute weights that read a unit, times the root mean square of what they multiply.

    .. math:: W_j = \sum_{c \in j} \sum_i \lvert w_{i,c} \rvert \sqrt{\tfrac{1}{N} \sum_{n=1}^N x_{n,c}^2}

    over the input features c of unit j in the layers that read it, and the N positions of all samples. It is
    the sum of the scores that the criterion of this name gives to these weights one by one
    (`secateur.score` with single weights).

    Source: Wanda-sp, the structured form of Wanda (Sun et al. 2024, arXiv 2306.11695) that An et al. 2023
    (FLAP, arXiv 2312.11983) compare with; there with the same ratio in each layer, which is
    ``sc.Uniform(removal="wanda")``. Departures: the mean square instead of the sum, as for single weights;
    units of any network.

    Direction: large means worth more. Needs no labels.

    Example:
        >>> import torch
        >>> import secateur as sc
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 1, bias=False))
        >>> _ = net[0].weight.data.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        >>> _ = net[1].weight.data.copy_(torch.tensor([[3.0, -1.0]]))
        >>> graph = sc.trace(net, torch.zeros(2, 2))
        >>> data = [torch.tensor([[5.0, 2.0], [5.0, -2.0]])]
        >>> sc.score(graph, data, "wanda", progress=False)["wanda"]["0"]
        array([15.,  2.])
    """

    name: ClassVar[str] = "wanda"

    @staticmethod
    def worth(features: Features) -> Tensor:
        """The root mean square of each feature times its absolute weights."""
        return features.square.sqrt() * features.weight.abs().sum(1)
