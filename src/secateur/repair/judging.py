"""How far a model is from the dense one, sample by sample."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from secateur.calibration import Batch, Calibration
from secateur.calibration.thinning import thinned
from secateur.evaluate import floats_of, squared_distance
from secateur.models import device_of, evaluating
from secateur.score.loss import LossFn

PIECES = 8
"""A loss is taken of each batch in this many pieces: a single value says nothing about its spread."""

HELD_BYTES = 1 << 28
"""Outputs of the dense model are kept from one candidate to the next while they take no more than this."""


class Judge:
    """How far from the dense model a model is, on held-out data.

    Without a loss it is the squared distance of the outputs to the dense model's, relative to the mean square
    of these. It needs no labels, and it tells candidates apart better than the loss on labels does, which is
    noisier on as few samples (`docs/auto.md` has the measurement).
    """

    def __init__(self, dense: nn.Module, data: Calibration, loss_fn: LossFn | None = None) -> None:
        """Prepare.

        Args:
            dense: The dense model.
            data: Held-out data.
            loss_fn: The mean loss of a batch, which judges instead.
        """
        self._dense, self._data, self._loss_fn = dense, data.to(device_of(dense)), loss_fn
        self._kept: dict[int, list[Tensor]] = {}
        self._bytes = 0

    def on_part(self, samples: int, *, whole: bool) -> Judge:
        """The same, by about so many of the samples, in whole batches if need be."""
        part = thinned(self._data, samples / max(1, self.samples), whole=whole)
        return Judge(self._dense, part, self._loss_fn)

    @property
    def measure(self) -> str:
        """What the errors are."""
        return "distance to dense" if self._loss_fn is None else "loss"

    @cached_property
    def samples(self) -> int:
        """How many judge."""
        return sum(batch.size for batch in self._data)

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> NDArray[np.float64]:
        """The error on each sample, or each few samples, the same and in the same order for every model."""
        errors: list[float] = []
        norms: list[float] = []
        with evaluating(model), evaluating(self._dense):
            for batch in self._data.batches():
                if self._loss_fn is not None:
                    errors += [float(self._loss_fn(model, piece.raw)) for piece in batch.cut(PIECES)]
                    continue
                error, norm = squared_distance(floats_of(batch.run(model)), self._wanted(batch), batch.size)
                errors += error.tolist()
                norms += norm.tolist()
        scale = float(np.mean(norms)) if norms else 1.0
        return np.array(errors, dtype=np.float64) / (scale or 1.0)

    def _wanted(self, batch: Batch) -> list[Tensor]:
        if batch.index in self._kept:
            return self._kept[batch.index]
        found = floats_of(batch.run(self._dense))
        size = sum(t.nbytes for t in found)
        if self._bytes + size <= HELD_BYTES:
            self._kept[batch.index] = found
            self._bytes += size
        return found


MARGIN = 3.0
"""Standard errors of the difference to the best, beyond which one is clearly worse."""


def standard_errors(differences: NDArray[np.float64]) -> float:
    """The mean of differences in units of its standard error; infinite where one is not finite."""
    if not np.isfinite(differences).all():
        return float("inf")
    mean = float(differences.mean())
    if len(differences) < 2 or mean == 0:
        return 0.0
    spread = float(differences.std(ddof=1)) / len(differences) ** 0.5
    return mean / spread if spread else float(np.copysign(np.inf, mean))
