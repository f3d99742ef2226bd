"""Measure how far a model is from the dense model, sample by sample."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from secateur.calibration import Batch, Calibration
from secateur.calibration.batch import held_tensors
from secateur.calibration.ending import check_same
from secateur.calibration.subset import take_share
from secateur.common.mapped import any_mapped, trim
from secateur.common.models import device_of, evaluating
from secateur.measure.divergence import class_scores, diverged, reads_and_writes_words
from secateur.measure.evaluate import floats_of, squared_distance
from secateur.measure.measures import DISTANCE, DIVERGENCE, LOSS
from secateur.signals.distributed import team_of_processes
from secateur.signals.loss import LossFn, one_number, own_loss

PIECES = 8
"""A loss is computed on this many pieces of each batch: one value per batch would not show its spread."""

HELD_BYTES = 1 << 28
"""Most bytes of dense outputs that are kept for the next candidate. Others are computed again."""


class Judge:
    """Measures a model's error on held-out data. Lower is better.

    Without a loss function the error is the squared distance of the outputs to the dense model's outputs,
    divided by the mean square of the dense outputs; for language models, the divergence of the words'
    probabilities (`divergence.py` says why). It needs no labels. On few samples it is less noisy than a loss
    on labels, so it tells candidates apart better (`docs/auto.md` has the measurement).

    Attributes:
        data: The held-out data.
    """

    def __init__(
        self,
        dense: nn.Module,
        data: Calibration,
        loss_fn: LossFn | None = None,
        *,
        by_scores: bool | None = None,
    ) -> None:
        """Prepare to measure models; nothing runs yet.

        Args:
            dense: The dense model.
            data: Held-out data.
            loss_fn: Returns the mean loss of a batch. If given, it replaces the distance.
            by_scores: Measure the divergence of class probabilities, the mean over positions, in place of the
                distance (`divergence.py`). Default: for models that read and write words.
        """
        self._dense, self.data, self._loss_fn = dense, data.plain.to(device_of(dense)), loss_fn
        self._by_scores = by_scores if loss_fn is None else False
        self._kept: dict[int, list[Tensor]] = {}
        self._bytes = 0
        self._count: int | None = None  # of errors
        self._most = 0 if any_mapped(dense.parameters()) else HELD_BYTES  # in files: memory is short

    def on_part(self, samples: int, *, whole: bool) -> Judge:
        """Return a judge that uses about `samples` of the held-out samples.

        Args:
            samples: How many samples to use.
            whole: Take whole batches only, for models with a fixed batch size.
        """
        part = take_share(self.data, samples / max(1, self.samples), whole=whole)
        return Judge(self._dense, part, self._loss_fn, by_scores=self._by_scores)

    @property
    def measure(self) -> str:
        """The name of the error, a key of `MEASURES`."""
        if self._loss_fn is not None:
            return LOSS
        if self._by_scores is None:
            with torch.no_grad(), evaluating(self._dense):
                self._wanted(self.data.first())
        return DIVERGENCE if self._by_scores else DISTANCE

    @cached_property
    def samples(self) -> int:
        """The number of held-out samples."""
        with team_of_processes(device_of(self._dense)) as team, team.together():
            return self.data.samples()

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> NDArray[np.float64]:
        """Return the model's error on each sample (or, with a loss, on each piece of a batch). [errors]

        Every model gets the same samples in the same order, so errors of two models can be paired.
        """
        if not self._most:
            trim()  # what the steps before have freed
        found: dict[int, tuple[list[float], list[float]]] = {}
        with team_of_processes(device_of(self._dense)) as team:
            with team.together(), evaluating(model), evaluating(self._dense):
                for batch in self.data.batches(takes=team.takes):
                    found[batch.index] = self._measured(model, batch)
            for share in team.everyone(found):
                found |= share
        errors, norms = ([v for k in sorted(found) for v in found[k][i]] for i in (0, 1))
        check_same(len(errors), len(errors) if self._count is None else self._count)
        self._count = len(errors)
        scale = float(np.mean(norms)) if norms else 1.0
        return np.array(errors, dtype=np.float64) / (scale or 1.0)

    def fitting(self, errors: Tensor) -> NDArray[np.float64]:
        """Return errors that were kept, if they are as many as calls of this judge return.

        Raises:
            ValueError: They are not.
        """
        one_each = self._loss_fn is None  # with a loss, one for each piece of a batch
        count = len(errors) if errors.ndim == 1 and errors.dtype == torch.float64 else 0
        if not 0 < count <= self.samples or (one_each and count != self.samples):
            raise ValueError(f"errors {list(errors.shape)} of {errors.dtype}, of {self.samples} samples")
        return errors.numpy()

    def _measured(self, model: nn.Module, batch: Batch) -> tuple[list[float], list[float]]:
        """Return the errors on a batch, and without a loss the mean squares of the dense outputs."""
        if self._loss_fn is not None:
            losses = (own_loss(self._loss_fn, model, piece.raw) for piece in batch.cut(PIECES))
            return [float(one_number(loss)) for loss in losses], []
        wanted = self._wanted(batch)
        if self._by_scores:
            return diverged(class_scores(batch.run(model)), wanted[0], batch), []
        error, norm = squared_distance(floats_of(batch.run(model), batch), wanted, batch.size)
        return error.tolist(), norm.tolist()

    def _wanted(self, batch: Batch) -> list[Tensor]:
        if batch.index in self._kept:
            return self._kept[batch.index]
        output = batch.run(self._dense)
        if self._by_scores is None:
            self._by_scores = reads_and_writes_words(held_tensors((batch.args, batch.kwargs)), output)
        found = [class_scores(output)] if self._by_scores else floats_of(output, batch)
        size = sum(t.nbytes for t in found)
        if self._bytes + size <= self._most:
            self._kept[batch.index] = found
            self._bytes += size
        return found


MARGIN = 3.0
"""A candidate is clearly worse if its error exceeds the best one by more standard errors than this."""


def standard_errors(differences: NDArray[np.float64]) -> float:
    """Return the mean of paired differences divided by the standard error of that mean.

    Args:
        differences: Error of one model minus error of another, per sample. [samples]

    Returns:
        The quotient; infinity if a difference is not finite, 0 if there is only one.
    """
    if not np.isfinite(differences).all():
        return float("inf")
    mean = float(differences.mean())
    if len(differences) < 2 or mean == 0:
        return 0.0
    spread = float(differences.std(ddof=1)) / len(differences) ** 0.5
    return mean / spread if spread else float(np.copysign(np.inf, mean))
