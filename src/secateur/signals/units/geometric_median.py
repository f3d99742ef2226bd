"""How far a unit's weights are from those of the others: what is near them can be replaced by them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from secateur.graph.groups import Group
from secateur.signals.combine import Combine, Combined, combined
from secateur.signals.signal import Context, Need, Tally, Vector
from secateur.signals.slices import relative, unit_rows, weight_slices


@dataclass(frozen=True)
class GeometricMedian(Combined):
    r"""Sum of the Euclidean distances of a unit's producing weights to those of the group's other units.

    .. math:: G_j = \sum_{i} \lVert w_j - w_i \rVert_2

    The unit for which it is least is nearest to the geometric median of all, and the others can stand in for
    it. Each producing tensor's sums are divided by their mean over the units, so that tensors of different
    scale count alike, and then combined. Biases do not count.

    Source: He et al. 2019, Filter Pruning via Geometric Median (FPGM), arXiv 1811.00250.

    Direction: large means that no other unit can replace it, so it is worth more. Needs no data. Costs
    group.size² · weights a unit.

    Attributes:
        combine: How several tensors become one score; see `secateur.signals.combine`.

    Example:
        >>> import torch
        >>> import secateur as sc
        >>> net = torch.nn.Sequential(torch.nn.Linear(1, 3, bias=False), torch.nn.Linear(3, 2, bias=False))
        >>> _ = net[0].weight.data.copy_(torch.tensor([[1.0], [2.0], [3.0]]))
        >>> _ = net[1].weight.data.copy_(torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]]))
        >>> graph = sc.trace(net, torch.zeros(2, 1))
        >>> int(sc.score(graph, None, sc.signals.GeometricMedian())["geometric_median"]["0"].argmin())
        1
    """

    combine: Combine = "mean"

    name: ClassVar[str] = "geometric_median"
    needs: ClassVar[frozenset[Need]] = frozenset({"weights"})

    def start(self, context: Context) -> Tally:
        """Begin a run."""
        return _MedianTally(self, context)


class _MedianTally(Tally):
    def __init__(self, signal: GeometricMedian, context: Context) -> None:
        self._signal = signal
        self._context = context

    def finish(self) -> Mapping[str, Vector]:
        return {group.name: self._score(group) for group in self._context.graph.groups}

    def _score(self, group: Group) -> Vector:
        scores, units = [], []
        for piece in weight_slices(self._signal.name, self._context, group, ("produce",)):
            rows, unit = unit_rows(self._context.tensors[piece.tensor], piece, group.size)
            rows = rows - rows.mean(0)  # distances stay; what they are computed from gets smaller
            scores.append(relative(torch.cdist(rows, rows).sum(1).cpu().numpy()))
            units.append(unit)
        return combined(scores, units, group.size, self._signal.combine)
