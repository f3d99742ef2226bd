"""Layer-adaptive magnitude pruning."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from secateur.allocate.global_ranking import Global


@dataclass(frozen=True)
class LAMP(Global):
    r"""Global ranking by each score's square over the sum of its own and all larger squares of its group.

    .. math:: \text{LAMP}(u) = \frac{s_u^2}{\sum_{v:\, s_v \ge s_u} s_v^2}

    With s the magnitude of single weights, it is the share of the layer's output energy, in the worst case,
    that the weight's removal costs after all smaller ones have gone. The largest of a group has 1, so no
    layer is emptied while others have more than one left.

    Source: Lee et al. 2021, arXiv 2010.07611. Departure: any signal can take the weights' place, of any
    units.

    Attributes:
        ratio: Fraction of all units removed, in [0, 1). None if a budget decides.
        removal: Signal whose lowest scores go first: a name or an instance.

    Example:
        >>> import torch
        >>> import secateur as sc
        >>> _ = torch.manual_seed(0)
        >>> from secateur import masks
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> weights, scores = masks.Weights.of(net), masks.score(net)
        >>> plan = masks.allocate(weights, scores, sc.LAMP(), sc.Budget(sparsity=0.5))
        >>> round(plan.sparsity, 2)
        0.5
    """

    normalise: str = field(default="lamp", init=False)
    name: ClassVar[str] = "lamp"
