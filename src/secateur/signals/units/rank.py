"""How much information a unit's feature map holds: its rank as a matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.graph.groups import Group, Site
from secateur.signals.combine import Combine
from secateur.signals.observed import EntrySignal, EntryTally
from secateur.signals.signal import Context, Step, Tally

_CHUNK = 2**22
"""Most numbers of maps that are decomposed at a time."""


@dataclass(frozen=True)
class Rank(EntrySignal):
    r"""Mean rank of a unit's feature map, as a matrix of rows and columns.

    .. math:: K_j = \frac{1}{n} \sum_{s=1}^n \operatorname{rank}(a_{s,j}),
              \qquad a_{s,j} \in \mathbb{R}^{H \times W}

    over n samples, behind the activation function where there is one, else behind the normalisation, else
    behind the layer. Singular values below max(H, W) · ε of the largest do not count, ε being the precision
    of the activations. The columns are the map's last axis, the rows all axes before it (time, depth and
    height). The map of a unit without a second axis (a neuron, a channel over time or tokens) is a single
    row: its rank is 1 where the unit is not all zero, so the score is the share of samples on which it is
    active at all. Behind a smooth activation function that is 1 throughout and says nothing.

    Source: Lin et al. 2020, HRank, arXiv 2002.10179.

    Direction: large means more information, so worth more. Needs no labels. Slow: one singular value
    decomposition for each sample and unit; a few hundred samples are enough, as the source measures.

    Attributes:
        combine: How several entries become one score; see `secateur.signals.combine`.

    Example:
        >>> import torch
        >>> import secateur as sc
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 1, bias=False), torch.nn.Conv2d(3, 1, 1)).eval()
        >>> _ = net[0].weight.data.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])[:, :, None, None])
        >>> graph = sc.trace(net, torch.zeros(2, 2, 4, 4))
        >>> image = torch.stack([torch.eye(4), torch.ones(4, 4)])[None]  # a map of rank 4 and one of rank 1
        >>> sc.score(graph, [image], sc.signals.Rank(), progress=False)["rank"]["0"]
        array([4., 1., 4.])
    """

    combine: Combine = "mean"

    name: ClassVar[str] = "rank"

    def start(self, context: Context) -> Tally:
        """Begin a run."""
        return _RankTally(self, context)


class _RankTally(EntryTally):
    def __init__(self, signal: Rank, context: Context) -> None:
        super().__init__(signal, context, signal.combine)
        self._columns = 1

    def observe(self, group: Group, site: Site, value: Tensor, step: Step) -> None:
        self._columns = step.map[-1]
        super().observe(group, site, value, step)

    def measure(self, value: Tensor, site: Site) -> Tensor:
        samples, entries, size = value.shape
        if value.dtype not in (torch.float32, torch.float64):
            value = value.float()  # singular values are not computed in half precision
        columns = min(self._columns, size)  # without padding, a row of positions is shorter
        maps = value.reshape(samples * entries, size // columns, columns)
        parts = maps.split(max(1, _CHUNK // size))
        return torch.cat([_ranks(part) for part in parts]).reshape(samples, entries)


def _ranks(maps: Tensor) -> Tensor:
    """The rank of each map [maps, rows, columns]. [maps]"""
    if 1 in maps.shape[1:]:
        return (maps != 0).flatten(1).any(1).long()
    ranks: Tensor = torch.linalg.matrix_rank(maps)
    return ranks
