"""Sums of layers' inputs and outputs over positions, from which the errors of removals are computed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from secateur.repairs.regression.leastsquares import add_products

PROBES = 8
"""Number of random sign vectors that estimate how much samples differ."""


class Columns:
    """Sums over positions of the inputs of layers, in float64. Layers with the same inputs share them.

    Attributes:
        state: ``count``, the number of positions; ``x`` [parts, columns] and ``xx`` [parts, columns,
            columns], the sums of the columns and of their products. Further sums run over samples. Let a
            sample have m positions, and let P be the sum over these of products of different columns. Then
            ``m2`` sums the squares of m; ``mpz`` sums m P z for each probe z [parts, probes, columns]; and
            ``pz2`` sums all squares of P z [parts].
        views: Number of views of each sample, which together count as one sample.
    """

    def __init__(self, parts: int, columns: int, device: torch.device, views: int = 1) -> None:
        options: Any = {"dtype": torch.float64, "device": device}
        signs = torch.randint(2, (PROBES, columns), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
        self._probes = signs.to(device)
        self.views = views
        self.state = {
            "count": torch.zeros((), **options),
            "x": torch.zeros(parts, columns, **options),
            "xx": torch.zeros(parts, columns, columns, **options),
            "m2": torch.zeros((), **options),
            "mpz": torch.zeros(parts, PROBES, columns, **options),
            "pz2": torch.zeros(parts, **options),
        }

    def add(self, x: Tensor, samples: int, rows: Tensor | slice = slice(None)) -> None:
        """Add some samples.

        Args:
            x: The inputs, all positions of one sample after those of another. [parts, positions, columns]
            samples: Number of samples.
            rows: Which positions are no padding. bool [positions], or a slice for all positions.
        """
        if x.shape[1] == 0:  # an expert may get no token
            return
        x = x if x.dtype in (torch.float32, torch.float64) else x.float()  # products are as exact as values
        real = torch.ones(x.shape[1], dtype=torch.bool, device=x.device) if isinstance(rows, slice) else rows
        x = x if isinstance(rows, slice) else x * real[:, None]
        m = real.reshape(samples, -1).sum(1, dtype=torch.float64)  # positions of each sample
        self.state["count"] += m.sum()
        self.state["x"] += x.sum(1)
        add_products(self.state["xx"], x)
        each = x.reshape(len(x), samples, x.shape[1] // samples, -1)
        squares = each.square().sum(2)
        for k, z in enumerate(self._probes.to(x.dtype)):
            pz = ((each @ z)[:, :, None] @ each)[:, :, 0] - squares * z  # [parts, samples, columns]
            self.state["mpz"][:, k] += (m[:, None] * pz).sum(1)
            self.state["pz2"] += pz.square().sum((1, 2), dtype=torch.float64)
        self.state["m2"] += m.square().sum()

    def covariance(self) -> Tensor:
        """Return the covariance of the columns, shrunk towards its diagonal. [parts, columns, columns]"""
        count = self.state["count"].clamp_min(1)
        mean, second = self.state["x"] / count, self.state["xx"] / count
        differ = self.state["pz2"]  # becomes the sum over samples of |P z - m E[P z]|^2
        for z, mpz in zip(self._probes.double(), self.state["mpz"].unbind(1), strict=True):
            typical = second @ z - second.diagonal(dim1=1, dim2=2) * z
            differ = differ - (2 * mpz - self.state["m2"] * typical).mul(typical).sum(1)
        samples = count.square() / (self.views * self.state["m2"]).clamp_min(1)
        error = self.views * differ / (PROBES * count.square()) * samples / (samples - 1).clamp_min(1)
        return shrunk(second - mean[:, :, None] * mean[:, None], error)


class Uncorrelated(Columns):
    """Columns that are known to be uncorrelated, so that only their squares are summed.

    Attributes:
        state: ``count``, the number of positions, and ``xx`` [parts, columns], the squares of the columns.
    """

    def __init__(self, parts: int, columns: int, device: torch.device, views: int = 1) -> None:
        self.views = views
        options: Any = {"dtype": torch.float64, "device": device}
        self.state = {"count": torch.zeros((), **options), "xx": torch.zeros(parts, columns, **options)}

    def add(self, x: Tensor, samples: int, rows: Tensor | slice = slice(None)) -> None:
        """Add some samples, as `Columns.add` does."""
        x = x[:, rows]
        self.state["count"] += x.shape[1]
        self.state["xx"] += x.double().square().sum(1)

    def covariance(self) -> Tensor:
        """Return a diagonal matrix of the mean squares. [parts, columns, columns]"""
        return torch.diag_embed(self.state["xx"] / self.state["count"].clamp_min(1))


class Ends:
    """Sums over positions of the value that a layer's output is added to, in float64.

    Attributes:
        state: ``count``, the number of positions; ``y`` and ``yy`` [parts, outputs], the values and their
            squares.
    """

    def __init__(self, parts: int, outputs: int, device: torch.device) -> None:
        options: Any = {"dtype": torch.float64, "device": device}
        self.state = {
            "count": torch.zeros((), **options),
            "y": torch.zeros(parts, outputs, **options),
            "yy": torch.zeros(parts, outputs, **options),
        }

    def add(self, y: Tensor) -> None:
        """Add the values y [parts, positions, outputs]."""
        y = y if y.dtype in (torch.float32, torch.float64) else y.float()
        self.state["count"] += y.shape[1]
        self.state["y"] += y.sum(1)
        self.state["yy"] += y.square().sum(1)

    def variance(self) -> float:
        """Return the variance, summed over all entries."""
        count = self.state["count"].clamp_min(1)
        around = self.state["yy"] / count - (self.state["y"] / count).square()
        return float(around.clamp_min(0).sum())


def shrunk(covariance: Tensor, error: Tensor) -> Tensor:
    """Shrink a covariance towards its diagonal, as far as its other entries are uncertain.

    With fewer samples than columns, any column is a combination of others, and any unit would seem
    replaceable. The other entries are reduced by their expected squared error, divided by their sum of
    squares.

    Source: Ledoit and Wolf 2004, A well-conditioned estimator for large-dimensional covariance matrices; with
    the diagonal as target as in Schäfer and Strimmer 2005. Departures: the error is that between
    samples, not between positions, which depend on each other; products are about zero, not about the mean,
    which gives a larger error; and the error is estimated with random signs (`PROBES`) instead of all entries
    (Hutchinson 1990).

    Args:
        covariance: [parts, columns, columns]
        error: Sum of the expected squared errors of all entries outside of the diagonal. [parts]
    """
    diagonal = torch.diag_embed(covariance.diagonal(dim1=1, dim2=2))
    size = (covariance - diagonal).square().sum((1, 2))
    share = torch.where(size > 0, error / size, 0.0).clamp(0, 1)[:, None, None]
    return torch.lerp(covariance, diagonal, share)


def added_up(size: int, consumers: Iterable[tuple[Tensor, Tensor, Tensor]]) -> NDArray[np.float64]:
    """Return the error after each unit and all cheaper ones are removed, for uncorrelated columns. [size]

    Args:
        size: Number of units.
        consumers: As for `secateur.repairs.regression.elimination.Consumer`. Only the diagonal
            of a scatter is used.
    """
    each = np.zeros(size)
    for scatter, weight, unit in consumers:
        errors = scatter.diagonal() * weight.square().sum(1)
        own = (unit >= 0).cpu().numpy()
        each += np.bincount(unit.cpu().numpy()[own], errors.cpu().numpy()[own], minlength=size)
    order = np.argsort(each, kind="stable")
    found = np.empty(size)
    found[order] = np.cumsum(each[order])
    return found
