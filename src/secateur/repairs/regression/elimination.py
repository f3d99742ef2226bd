"""Remove inputs of layers one after another, and update the fit of the others instead of refitting it.

For least squares the error that a removal adds is known without refitting: with H the scatter matrix of a
layer's columns and W its refitted weight, removing the columns c of a unit adds ``W_c^T (H^-1)_cc^-1 W_c``
to the error, and H^-1 and W without them follow by elimination (the optimal brain surgeon of Hassibi and
Stork 1993, for blocks of columns; the error of a layer is exactly quadratic).
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

DAMPING = 1e-4
"""Damping that is added to the scatter's diagonal, relative to its mean."""

STEPS = 128
"""About this many eliminations are made for a group: large groups lose several units in each."""

SPARSE = 1.25
"""The matrices are compressed when they have this many times the columns that are left."""


class Consumer:
    """A regression whose columns belong to units, from which units are eliminated."""

    def __init__(self, scatter: Tensor, weight: Tensor, unit: Tensor) -> None:
        """Prepare.

        Args:
            scatter: Scatter matrix of the columns, about their mean. float64 [columns, columns]
            weight: The weight, scaled so that errors of all outputs count equally. float64 [columns, outputs]
            unit: The unit of each column; -1 for columns that stay. [columns]
        """
        damped = scatter.clone()
        damped.diagonal().add_(DAMPING * float(damped.diagonal().mean()) or 1.0)
        factor, failed = torch.linalg.cholesky_ex(damped)  # it can fail only because of rounding
        self._inverse = torch.linalg.inv(damped) if bool(failed) else torch.cholesky_inverse(factor)
        # Only products of rows of the weight matter, so no more outputs than columns are needed.
        wide = weight.shape[1] > len(weight)
        self._weight = torch.linalg.qr(weight.t(), mode="r").R.t().contiguous() if wide else weight.clone()
        self._stays = torch.ones(len(weight), dtype=torch.bool, device=weight.device)
        # For each number of columns: the units that have so many, and their columns.
        by_count: dict[int, list[tuple[int, Tensor]]] = {}
        for u in unit.unique().tolist():
            if u >= 0:
                columns = (unit == u).nonzero()[:, 0]
                by_count.setdefault(len(columns), []).append((int(u), columns))
        self._columns = [
            (np.array([u for u, _ in found]), torch.stack([columns for _, columns in found]))
            for found in by_count.values()
        ]

    def losses(self, size: int) -> NDArray[np.float64]:
        """Return the error that removing each unit alone adds; zero for removed units. [size]"""
        found = np.zeros(size)
        for units, c in self._columns:
            weight = self._weight[c]
            solved = torch.linalg.solve(self._inverse[c[:, :, None], c[:, None, :]], weight)
            found[units] = (weight * solved).sum((1, 2)).cpu().numpy()
        return found

    def remove(self, units: NDArray[np.int64]) -> None:
        """Remove units, and update the weight and the inverse for the others."""
        found, left = [], []
        for own, columns in self._columns:
            gone = np.isin(own, units)
            found.append(columns[torch.as_tensor(gone, device=columns.device)].flatten())
            if not gone.all():
                left.append((own[~gone], columns[torch.as_tensor(~gone, device=columns.device)]))
        self._columns = left
        c = torch.cat(found)
        if not len(c):
            return
        across = self._inverse[:, c]
        factor = torch.linalg.solve(across[c], torch.cat([self._weight[c], across.t()], 1))
        outputs = self._weight.shape[1]
        self._weight.addmm_(across, factor[:, :outputs], alpha=-1)
        self._inverse.addmm_(across, factor[:, outputs:], alpha=-1)
        self._stays[c] = False
        if SPARSE * int(self._stays.sum()) < len(self._stays):
            self._compress()

    def _compress(self) -> None:
        """Drop the rows and columns of removed units, so that later steps are faster."""
        at = self._stays.nonzero()[:, 0]
        self._weight, self._inverse = self._weight[at], self._inverse[at][:, at]
        new = torch.cumsum(self._stays, 0) - 1
        self._columns = [(units, new[columns]) for units, columns in self._columns]
        self._stays = torch.ones_like(at, dtype=torch.bool)


def eliminate(size: int, consumers: list[Consumer]) -> NDArray[np.float64]:
    """Remove all units, the cheapest first. Return the error after each unit's removal. [size]

    Args:
        size: Number of units.
        consumers: The regressions that read the units. Their errors add up. They are changed.
    """
    alive, value, error = np.ones(size, dtype=bool), np.zeros(size), 0.0
    while alive.any():
        left = np.flatnonzero(alive)
        losses = sum((consumer.losses(size) for consumer in consumers), np.zeros(size))[left]
        count = max(1, min(size // STEPS, len(left)))
        order = np.argsort(losses, kind="stable")[:count]
        gone = left[order]
        for unit, loss in zip(gone, losses[order], strict=True):
            error += float(loss)
            value[unit] = error
        for consumer in consumers:
            consumer.remove(gone)
        alive[gone] = False
    return value
