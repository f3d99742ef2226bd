"""Layer-adaptive magnitude pruning."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from secateur.allocators.global_ranking import Global


@dataclass(frozen=True)
class LAMP(Global):
    r"""Ranks all units of the model by their LAMP score, and removes the lowest.

    .. math:: \text{LAMP}(u) = \frac{s_u^2}{\sum_{v:\, s_v \ge s_u} s_v^2}

    The sum runs over the unit u and all units of its group with larger scores. If s is the magnitude of
    single weights, this is the worst-case share of the layer's output energy that is lost by removing the
    weight after all smaller ones. The largest score of each group becomes 1. So no layer becomes empty while
    other layers have more than one unit.

    Source: Lee et al. 2021, arXiv 2010.07611. Departure: it works for any signal and any units, not only for
    magnitudes of weights.

    Attributes:
        ratio: Fraction of all units to remove, in [0, 1). None if a budget decides.
        removal: Signal whose lowest scores are removed first: a name or an instance.

    Example:
        >>> import torch
        >>> import secateur as sc
        >>> _ = torch.manual_seed(0)
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> weights = sc.trace(net, granularity="weight")
        >>> scores = sc.score(weights)
        >>> plan = sc.LAMP().allocate(weights, scores, sc.Budget(sparsity=0.5))
        >>> round(plan.sparsity, 2)
        0.5
    """

    normalise: str = field(default="lamp", init=False)
    name: ClassVar[str] = "lamp"
