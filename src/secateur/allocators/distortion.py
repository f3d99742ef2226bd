"""Distortion curves: how much a layer's outputs change at each sparsity, before and after repair."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from secateur.allocators.hull import lower_hull

GRID = (0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99, 1.0)
"""Sparsities at which the curves are measured."""


@dataclass(frozen=True, eq=False)
class Distortion:
    """Distortion of outputs against sparsity, before and after repair.

    The outputs are those of one pruned layer; if units are pruned, those of the layers that read the units.
    Distortion is the squared error of the outputs over the sum of squares of the dense outputs.

    Attributes:
        sparsity: Fractions that are removed, ascending, from 0 to 1. [points]
        raw: D_raw, the distortion without repair. [points]
        repaired: D_rep, the distortion after each output's mean and variance are matched to the dense ones.
            [points]
        whole: The distortion if all outputs are constant at their mean, which is their relative variance.
            None: use D_rep(1), which is equal if everything that the outputs read can be removed.
        readers: Number of layers over which the distortions are a mean. The price counts each of them.
    """

    sparsity: NDArray[np.float64]
    raw: NDArray[np.float64]
    repaired: NDArray[np.float64]
    whole: float | None = None
    readers: int = 1

    @property
    def ratio(self) -> NDArray[np.float64]:
        """RR = D_rep / D_raw: the fraction of the distortion that repair leaves; 0 if D_raw is 0. [points]"""
        found: NDArray[np.float64] = self.repaired / np.where(self.raw > 0, self.raw, np.inf)
        return found

    def residual(self, sparsity: float) -> float:
        """D_rep at a sparsity, interpolated linearly between the points."""
        return float(np.interp(sparsity, self.sparsity, self.repaired))

    def price(self, sparsity: NDArray[np.float64]) -> NDArray[np.float64]:
        """Price of more sparsity: the slope of D_rep(s), over the outputs' variance, times `readers`.

        The price never falls with sparsity. It uses the lower convex hull of D_rep: each piece of the hull
        gives its slope at its middle, and the price is linear between the middles. It is 0 at sparsity 0.
        After the last middle it continues with the same steepness.

        Args:
            sparsity: Values in [0, 1], of any shape. The result has the same shape.
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
    """Sums over samples and positions of a layer's dense output y and its pruned outputs z.

    Attributes:
        count: Number of samples × positions.
        y: Sum of y. [outputs]
        yy: Sum of y². [outputs]
        z: Sum of z. [sparsities, outputs]
        zz: Sum of z². [sparsities, outputs]
        yz: Sum of y · z. [sparsities, outputs]
    """

    count: int
    y: Tensor
    yy: Tensor
    z: Tensor
    zz: Tensor
    yz: Tensor

    @classmethod
    def of(cls, y: Tensor, pruned: Iterable[Tensor]) -> Moments:
        """Sum the outputs of one batch.

        Args:
            y: Dense output. [positions, outputs]
            pruned: Pruned output for each sparsity, made one at a time to save memory. [positions, outputs]
        """
        y = y.double()
        sums = [(z.sum(0), z.square().sum(0), (z * y).sum(0)) for z in (v.double() for v in pruned)]
        theirs = (torch.stack(found) for found in zip(*sums, strict=True))
        return cls(len(y), y.sum(0), y.square().sum(0), *theirs)

    def __add__(self, other: Moments) -> Moments:
        return Moments(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def distortion(self, sparsity: Sequence[float]) -> Distortion:
        """Compute the distortion without repair, and after matching each output's mean and variance.

        Matching replaces z by ``(z - mean z) σ_y / σ_z + mean y``. The mean squared error of that is
        ``σ_y² + σ_y² - 2 cov σ_y / σ_z`` for each output, or σ_y² if z is constant.
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
