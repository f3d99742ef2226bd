"""How much of the damage to a layer's outputs repair leaves: curves, and the sums they come from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from secateur.allocate.hull import lower_hull

GRID = (0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99, 1.0)
"""Sparsities at which the curves are measured."""


@dataclass(frozen=True, eq=False)
class Distortion:
    """What pruning alone does to a layer's outputs, or units to the outputs of their consumers; and repair.

    Distortion is the squared error of the outputs over the sum of their squares.

    Attributes:
        sparsity: Ascending, from 0 to 1. [points]
        raw: D_raw, the distortion. [points]
        repaired: D_rep, what is left of it after each output's mean and variance are matched. [points]
        whole: The distortion of outputs that are constant, at their mean: their variance; None: D_rep(1),
            which is the same where all that the outputs read can go.
        readers: Of how many layers the distortions are the mean; each counts in the price.
    """

    sparsity: NDArray[np.float64]
    raw: NDArray[np.float64]
    repaired: NDArray[np.float64]
    whole: float | None = None
    readers: int = 1

    @property
    def ratio(self) -> NDArray[np.float64]:
        """RR = D_rep / D_raw: the fraction of the damage that repair leaves; 0 where none is. [points]"""
        found: NDArray[np.float64] = self.repaired / np.where(self.raw > 0, self.raw, np.inf)
        return found

    def residual(self, sparsity: float) -> float:
        """D_rep at a sparsity, linear between the points."""
        return float(np.interp(sparsity, self.sparsity, self.repaired))

    def price(self, sparsity: NDArray[np.float64]) -> NDArray[np.float64]:
        """How fast outputs are lost with sparsity: the slope of D_rep(s) over their variance, times readers.

        It never falls: slopes are those of the lower convex hull, each at the middle of its piece, linear in
        between; 0 at sparsity 0, and beyond the last middle rising on as before it.
        """
        whole = float(self.repaired[-1]) if self.whole is None else self.whole
        x, y = lower_hull(self.sparsity, self.readers * np.maximum.accumulate(self.repaired) / (whole or 1.0))
        slope, middle = np.diff(y) / np.diff(x), (x[1:] + x[:-1]) / 2
        slope, middle = np.append(0.0, slope), np.append(0.0, middle)
        steepness = (slope[-1] - slope[-2]) / (middle[-1] - middle[-2])
        end = slope[-1] + steepness * (1 - middle[-1])
        found: NDArray[np.float64] = np.interp(sparsity, np.append(middle, 1.0), np.append(slope, end))
        return found


@dataclass
class Moments:
    """Sums over samples and positions of a layer's own output y and its pruned output z.

    Attributes:
        count: Samples times positions.
        y: [outputs]
        yy: Squares. [outputs]
        z: [sparsities, outputs]
        zz: Squares. [sparsities, outputs]
        yz: Products. [sparsities, outputs]
    """

    count: int
    y: Tensor
    yy: Tensor
    z: Tensor
    zz: Tensor
    yz: Tensor

    @classmethod
    def of(cls, y: Tensor, pruned: Iterable[Tensor]) -> Moments:
        """Of outputs [positions, outputs] each, the pruned ones made one after another."""
        y = y.double()
        sums = [(z.sum(0), z.square().sum(0), (z * y).sum(0)) for z in (v.double() for v in pruned)]
        theirs = (torch.stack(found) for found in zip(*sums, strict=True))
        return cls(len(y), y.sum(0), y.square().sum(0), *theirs)

    def __add__(self, other: Moments) -> Moments:
        return Moments(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def distortion(self, sparsity: Sequence[float]) -> Distortion:
        """Raw, and with each output's mean and variance matched, over the sum of squares of y.

        Matching takes z to ``(z - mean z) σ_y / σ_z + mean y``, whose squared error is, for each output and
        position, ``σ_y² + σ_y² - 2 cov σ_y / σ_z``, and σ_y² where z is constant.
        """
        n = self.count
        vary = (self.yy / n - (self.y / n).square()).clamp_min(0)
        varz = (self.zz / n - (self.z / n).square()).clamp_min(0)
        cov = self.yz / n - (self.y / n) * (self.z / n)
        rounding = 1e-12 * self.zz / n
        gain = torch.where(
            varz > rounding, (vary / varz.clamp_min(torch.finfo(torch.float64).tiny)).sqrt(), 0.0
        )
        raw = (self.zz - 2 * self.yz + self.yy).clamp_min(0).sum(1)
        repaired = n * (vary + gain.square() * varz - 2 * gain * cov).clamp_min(0).sum(1)
        scale = float(self.yy.sum()) or 1.0
        return Distortion(
            np.asarray(sparsity, dtype=np.float64),
            (raw / scale).cpu().numpy(),
            (repaired / scale).cpu().numpy(),
            float(n * vary.sum()) / scale,
        )
