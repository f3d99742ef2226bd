"""How much a unit is scaled by its normalisation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from secateur.errors import ScoreError
from secateur.graph.groups import Group, Slice
from secateur.signals.combine import Combine, Combined, combined
from secateur.signals.signal import Context, Need, Tally, Vector
from secateur.signals.slices import multipliers


@dataclass(frozen=True)
class BatchNormScale(Combined):
    r"""Absolute weight of the normalisations that scale a unit.

    .. math:: S_j = \frac{1}{|T_j|} \sum_{t \in T_j} \lvert \gamma_{t,j} \rvert

    over the normalisations T_j of unit j, behind the layers that produce it or before those that consume it,
    and layer scales. A unit that nothing scales is scaled by 1: a group without normalisation scores 1
    throughout, which says nothing about its units. A model in which that holds for every group is refused.

    Source: Liu et al. 2017, Network Slimming, arXiv 1708.06519. Departure: a unit with several normalisations
    (a residual stream) is worth their mean.

    Direction: large means worth more. Needs no data.

    Attributes:
        combine: How several scales become one score; see `secateur.signals.combine`.

    Example:
        >>> import torch
        >>> import secateur as sc
        >>> norm = torch.nn.BatchNorm2d(3)
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 3, 1), norm, torch.nn.Conv2d(3, 1, 1)).eval()
        >>> _ = norm.weight.data.copy_(torch.tensor([1.0, -2.0, 3.0]))
        >>> graph = sc.trace(net, torch.zeros(2, 1, 4, 4))
        >>> sc.score(graph, None, sc.signals.BatchNormScale())["batchnorm_scale"]["0"]
        array([1., 2., 3.])
    """

    combine: Combine = "mean"

    name: ClassVar[str] = "batchnorm_scale"
    needs: ClassVar[frozenset[Need]] = frozenset({"weights"})

    def start(self, context: Context) -> Tally:
        """Begin a run."""
        return _ScaleTally(self, context)


class _ScaleTally(Tally):
    def __init__(self, signal: BatchNormScale, context: Context) -> None:
        self._signal = signal
        self._context = context
        self._multipliers = multipliers(context.graph)
        # Not only the run's own groups: under a memory limit they are scored a few at a time.
        every = context.graph.all_groups
        if not any(self._slices(group) for group in every):
            raise ScoreError(
                f"{signal.name}: expected a normalisation with weights that scales some prunable unit, got "
                f"none in {len(every)} groups. Choose another signal, magnitude for example."
            )

    def finish(self) -> Mapping[str, Vector]:
        return {group.name: self._score(group) for group in self._context.graph.groups}

    def _slices(self, group: Group) -> list[Slice]:
        return [s for s in group.of_role("scale") if s.tensor in self._multipliers]

    def _score(self, group: Group) -> Vector:
        pieces = self._slices(group)
        scores = combined(
            [self._scale(piece) for piece in pieces],
            [piece.unit for piece in pieces],
            group.size,
            self._signal.combine,
        )
        unscaled = np.ones(group.size, dtype=np.bool_)
        for piece in pieces:
            unscaled[piece.unit] = False
        return np.where(unscaled, 1.0, scores)

    def _scale(self, piece: Slice) -> Vector:
        """The absolute scale at each position; the mean where a position has several. [entries]"""
        scale = self._context.tensors[piece.tensor].detach().double().abs().movedim(piece.axis, 0)
        each: Vector = scale.reshape(len(scale), -1).mean(1).cpu().numpy()
        return each[piece.position]
