"""How curved the loss is along a unit: the diagonal of the empirical Fisher information."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from secateur.signals.gate import GateSignal


@dataclass(frozen=True)
class Fisher(GateSignal):
    r"""Second-order estimate of the loss that removing a unit adds.

    .. math:: F_j = \frac{1}{2 n} \sum_{s=1}^n \Bigl( \sum_m a_{s,j,m} \,
              \frac{\partial L_s}{\partial a_{s,j,m}} \Bigr)^2

    over n samples, the sum inside running over the unit's map and all its members (entries, and layers that
    add to one stream), behind the activation function where there is one, else behind the normalisation, else
    behind the layer. Inside the square is the derivative with respect to a factor of 1 on the unit, so the
    mean square is that factor's Fisher information, which takes the place of the second derivative at an
    optimum. Gradients are squared sample by sample, not batch by batch, so that scores do not depend on how
    samples are cut into batches; L_s is sample s's own loss: the batch's loss has to be the mean of its
    samples'.

    Source: Theis et al. 2018, arXiv 1801.05787. As there, the gradients are those of the given labels: the
    empirical Fisher information, not that of labels drawn from the model.

    Direction: large means that the task is sensitive to the unit, so it is to be protected.

    Example:
        >>> import torch
        >>> import secateur as sc
        >>> net = torch.nn.Sequential(torch.nn.Linear(1, 3, bias=False), torch.nn.Linear(3, 2, bias=False))
        >>> _ = net[0].weight.data.copy_(torch.tensor([[1.0], [2.0], [3.0]]))
        >>> _ = net[1].weight.data.copy_(torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]]))
        >>> graph = sc.trace(net, torch.zeros(2, 1))
        >>> data = [(torch.ones(4, 1), torch.tensor([0, 0, 0, 1]))]
        >>> sc.score(graph, data, sc.signals.Fisher(), progress=False)["fisher"]["0"].round(3)
        array([0.293, 0.   , 2.634])
    """

    name: ClassVar[str] = "fisher"

    def weigh(self, derivatives: Tensor) -> Tensor:
        """Half the square."""
        return derivatives.square() / 2
