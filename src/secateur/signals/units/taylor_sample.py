"""How sensitive the loss of single samples is to a unit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from secateur.signals.gate import GateSignal


@dataclass(frozen=True)
class TaylorSample(GateSignal):
    r"""Mean over samples of the first-order change of their loss when a unit's activations go to zero.

    .. math:: \Theta_j = \frac{1}{n} \sum_{s=1}^n \Bigl| \sum_m a_{s,j,m} \,
              \frac{\partial L_s}{\partial a_{s,j,m}} \Bigr|

    over n samples, the sum running over the unit's map and all its members (entries, and layers that add to
    one stream), behind the activation function where there is one, else behind the normalisation, else behind
    the layer. L_s is sample s's own loss: the batch's loss has to be the mean of its samples'.

    Source: Molchanov et al. 2017, arXiv 1611.06440. Departure: the sum over the map, where the paper takes
    the mean, so that the score is a change of the loss; the ranks within a layer are the same.

    `Taylor` takes the absolute value after adding up all samples: there, changes of opposite sign cancel.

    Direction: large means that the task is sensitive to the unit, so it is to be protected.

    Example:
        >>> import torch
        >>> import secateur as sc
        >>> net = torch.nn.Sequential(torch.nn.Linear(1, 3, bias=False), torch.nn.Linear(3, 2, bias=False))
        >>> _ = net[0].weight.data.copy_(torch.tensor([[1.0], [2.0], [3.0]]))
        >>> _ = net[1].weight.data.copy_(torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]]))
        >>> graph = sc.trace(net, torch.zeros(2, 1))
        >>> data = [(torch.ones(4, 1), torch.tensor([0, 0, 0, 1]))]
        >>> sc.score(graph, data, sc.signals.TaylorSample(), progress=False)["taylor_sample"]["0"].round(3)
        array([0.69 , 0.   , 2.071])
    """

    name: ClassVar[str] = "taylor_sample"

    def weigh(self, derivatives: Tensor) -> Tensor:
        """The absolute value."""
        return derivatives.abs()
