"""Removing inputs of layers one after another, with what is left refitted: a downdate, not a refit.

For least squares the error that a removal adds is known without refitting: with H the scatter matrix of a
layer's columns and W its refitted weight, losing the columns c of a unit adds ``W_c^T (H^-1)_cc^-1 W_c``
to the error, and H^-1 and W without them follow by elimination (the optimal brain surgeon of Hassibi and
Stork 1993, for blocks of columns; the error of a layer is exactly quadratic).
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

DAMPING = 1e-4
"""Added to the scatter's diagonal, relative to its mean."""

STEPS = 128
"""Large groups lose several units between two eliminations, so that there are about this many."""


class Consumer:
    """One regression whose columns belong to units, while units are eliminated."""

    def __init__(self, scatter: Tensor, weight: Tensor, unit: Tensor) -> None:
        """Prepare.

        Args:
            scatter: Of the columns, about their mean; float64 [columns, columns]
            weight: In units in which an error of one matters alike everywhere; float64 [columns, outputs]
            unit: Of each column; -1 for those that stay. [columns]
        """
        damped = scatter.clone()
        damped.diagonal().add_(DAMPING * float(damped.diagonal().mean()) or 1.0)
        self._inverse = torch.linalg.inv(damped)
        self._weight = weight.clone()
        self._columns = {int(u): (unit == u).nonzero()[:, 0] for u in unit.unique() if u >= 0}

    def losses(self, units: list[int]) -> NDArray[np.float64]:
        """The error that removing each unit alone adds. [units]"""
        found = np.zeros(len(units))
        by_count: dict[int, list[int]] = {}
        for k, unit in enumerate(units):
            if unit in self._columns:
                by_count.setdefault(len(self._columns[unit]), []).append(k)
        for places in by_count.values():
            c = torch.stack([self._columns[units[k]] for k in places])
            weight = self._weight[c]
            solved = torch.linalg.solve(self._inverse[c[:, :, None], c[:, None, :]], weight)
            found[places] = (weight * solved).sum((1, 2)).cpu().numpy()
        return found

    def lose(self, units: list[int]) -> None:
        """Remove units, and update what is left."""
        found = [self._columns.pop(unit) for unit in units if unit in self._columns]
        if not found:
            return
        c = torch.cat(found)
        across = self._inverse[:, c]
        factor = torch.linalg.solve(across[c], torch.cat([self._weight[c], across.t()], 1))
        outputs = self._weight.shape[1]
        self._weight -= across @ factor[:, :outputs]
        self._inverse -= across @ factor[:, outputs:]
        self._weight[c] = 0
        self._inverse[c] = 0
        self._inverse[:, c] = 0


def eliminate(size: int, consumers: list[Consumer]) -> NDArray[np.float64]:
    """The error after each unit and all before it are gone, when the cheapest goes first. [size]

    Args:
        size: Number of units.
        consumers: What reads them; their errors add up. They are used up.
    """
    alive, value, error = list(range(size)), np.zeros(size), 0.0
    while alive:
        losses = sum((c.losses(alive) for c in consumers), np.zeros(len(alive)))
        count = max(1, min(size // STEPS, len(alive)))
        order = np.argsort(losses, kind="stable")[:count]
        gone = [alive[k] for k in order]
        for k in order:
            error += float(losses[k])
            value[alive[k]] = error
        for consumer in consumers:
            consumer.lose(gone)
        alive = [unit for unit in alive if unit not in set(gone)]
    return value
