"""Measure how much worse a pruned model is than the dense one, sample by sample, on held-out data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from secateur.calibration import Batch, Calibration
from secateur.calibration.ending import check_same
from secateur.common.foreign import details, error_text
from secateur.common.models import device_of, evaluating
from secateur.errors import CalibrationError, SecateurError, SettingError
from secateur.measure.confidence import interval, upper_bound
from secateur.measure.evaluate import hits
from secateur.signals.distributed import team_of_processes
from secateur.signals.loss import LossFn, default_loss, logits_of, own_loss

Metric = Callable[[Callable[..., Any], Any], Any]
"""``metric(model, batch)`` returns one number for each sample [samples]; higher is better. Or it returns two
such rows, numerators and counts, whose sums are divided: correct words and all words, for example. `batch` is
the same as for ``loss_fn``."""

Row = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Values:
    """The measured values of a model on each sample.

    Attributes:
        above: Numerators. [samples]
        below: Counts, all one for a mean over samples. [samples]
    """

    above: Row
    below: Row

    @property
    def mean(self) -> float:
        """The sum of the numerators, divided by the sum of the counts."""
        return float(self.above.sum() / self.below.sum())

    @property
    def shares(self) -> Row:
        """The contribution of each sample to the mean, to first order. Their mean is `mean`. [samples]"""
        return (self.above - self.mean * self.below) / float(self.below.mean()) + self.mean


@dataclass(frozen=True, eq=False)
class Damage:
    """How much worse a model is than the dense one.

    Attributes:
        dense: The dense model's value.
        model: The model's value.
        differences: The damage on each sample. [samples]
        scale: Converts the mean difference, or a bound on it, to the scale of the budget's bound.
    """

    dense: float
    model: float
    differences: Row
    scale: Callable[[float], float] = float

    @property
    def value(self) -> float:
        """The measured damage."""
        return self.scale(float(self.differences.mean()))

    def bound(self, confidence: float) -> float:
        """Upper confidence bound of the damage."""
        return self.scale(upper_bound(self.differences, confidence))

    def expected(self, samples: int, confidence: float) -> float:
        """Estimate what `bound` would be with this number of other samples."""
        spread = float(self.differences.std()) / samples**0.5
        return self.scale(float(self.differences.mean()) + NormalDist().inv_cdf(confidence) * spread)

    def interval(self, confidence: float) -> tuple[float, float]:
        """Confidence interval of the damage."""
        low, high = interval(self.differences, confidence)
        return self.scale(low), self.scale(high)


class Gauge:
    """Measures models against the dense one on the same samples.

    Without a metric, a sample is right if its largest logit is at its label. Without labels, it is right if
    the dense model predicts the same class.
    """

    def __init__(
        self,
        dense: nn.Module,
        data: Calibration,
        metric: Metric | None = None,
        loss_fn: LossFn | None = None,
    ) -> None:
        """Prepare to measure; nothing runs yet.

        Args:
            dense: The dense model.
            data: The samples.
            metric: The metric for `accuracy_drop`. None: the accuracy.
            loss_fn: The loss for `loss_rise` and `perplexity_rise`. None: the default loss.
        """
        self._dense, self.data = dense, data.plain.to(device_of(dense))
        self._metric, self._loss_fn = metric, loss_fn
        self._dense_values: dict[str, Values] = {}
        self._classes: dict[int, Tensor] = {}

    @cached_property
    def samples(self) -> int:
        """Number of samples."""
        return self.data.samples()

    @property
    def has_metric(self) -> bool:
        """Whether accuracy is measured by a metric of the user's own."""
        return self._metric is not None

    @cached_property
    def labelled(self) -> bool:
        """Whether the data have labels, or a metric is used instead."""
        return self.has_metric or self.data.first().labels is not None

    def bound(self) -> str:
        """The bound to measure if the user gave none: on accuracy if it is defined, else on the loss."""
        if self.has_metric:
            return "accuracy_drop"
        batch = self.data.first()
        with evaluating(self._dense), torch.no_grad():
            try:
                self._right(self._dense, batch)
            except CalibrationError:
                return "loss_rise"
        return "accuracy_drop"

    def name(self, bound: str) -> str:
        """Name the quantity that is measured for a bound."""
        if bound != "accuracy_drop":
            return "loss" if bound == "loss_rise" else "perplexity"
        if self._metric is not None:
            return str(getattr(self._metric, "__name__", type(self._metric).__name__))
        return "accuracy" if self.labelled else "agreement with the dense model"

    def __call__(self, model: nn.Module, bound: str) -> Damage:
        """Measure a model.

        Args:
            model: The model.
            bound: The field of `Budget`, one of `allocators.budget.QUALITY`.
        """
        if bound not in self._dense_values:
            self._dense_values[bound] = self._values(self._dense, bound)
        before, after = self._dense_values[bound], self._values(model, bound)
        check_same(len(after.above), len(before.above))
        if bound == "accuracy_drop":
            return Damage(before.mean, after.mean, _drop(before, after))
        if bound == "loss_rise" and not before.mean > 0:
            raise SettingError(
                f"loss_rise: expected a dense model whose mean loss is above 0, got {before.mean:.4g}. Bound "
                "accuracy_drop with a metric."
            )
        if bound == "loss_rise":  # the quotient of two means over the same samples, to first order
            quotient = after.mean / before.mean
            rise = (after.above - quotient * before.above) / before.mean + quotient - 1
            return Damage(before.mean, after.mean, rise)
        return Damage(
            float(np.exp(before.mean)), float(np.exp(after.mean)), after.above - before.above, _exp_minus_one
        )

    @torch.no_grad()
    def _values(self, model: nn.Module, bound: str) -> Values:
        above: list[Row] = []
        below: list[Row] = []
        device = device_of(self._dense)
        with team_of_processes(device) as team:
            with team.together(), evaluating(model), evaluating(self._dense):
                for batch in self.data.batches():
                    found = self._values_of_batch(model, batch, bound)
                    above.append(found.above)
                    below.append(found.below)
            # Each process measures all samples, and all use the values of the first one.
            found = team.from_first(Values(np.concatenate(above), np.concatenate(below)))
        if not np.isfinite(found.above).any() or not found.below.sum() > 0:
            raise CalibrationError(
                f"{self.name(bound)}: expected held-out samples with a label or count, got none: no label "
                "is a class, or all counts of the metric are 0. Check the labels of the held-out data."
            )
        return found

    @torch.no_grad()
    def check(self, bound: str) -> None:
        """Measure the dense model on one batch.

        Raises:
            CalibrationError: The model or the metric fails on it.
        """
        with evaluating(self._dense):
            self._values_of_batch(self._dense, self.data.first(), bound)

    def _values_of_batch(self, model: nn.Module, batch: Batch, bound: str) -> Values:
        """Measure one batch. Turn any error into a CalibrationError."""
        try:
            return self._measure_batch(model, batch, bound)
        except SecateurError:
            raise
        except Exception as error:  # a user's code may fail in any way
            raise CalibrationError(
                f"held-out data, batch {batch.index}: expected batches that the model and the metric accept, "
                f"got {error_text(error)}. Pass held_out= batches like those of the calibration data.",
                details(error),
            ) from error

    def _measure_batch(self, model: nn.Module, batch: Batch, bound: str) -> Values:
        if bound != "accuracy_drop":
            losses = np.array(sample_losses(model, batch, self._loss_fn), dtype=np.float64)
            return Values(losses, np.ones_like(losses))
        if self._metric is not None:
            return _checked(self._metric(model, batch.raw), batch)
        right = self._right(model, batch).double().cpu().numpy()
        return Values(right, np.ones_like(right))

    def _right(self, model: nn.Module, batch: Batch) -> Tensor:
        output = batch.run(model, labelled=True)
        found = hits(output, batch)
        if found is not None:
            return found
        logits = logits_of(output)
        if batch.labels is not None or logits is None or logits.ndim != 2:
            raise CalibrationError(
                "accuracy_drop: expected logits [samples, classes], and one class a sample if there are "
                f"labels, got {'no logits' if logits is None else list(logits.shape)}. Pass "
                "metric=function(model, batch), or bound loss_rise or perplexity_rise."
            )
        if batch.index not in self._classes:
            wanted = logits_of(batch.run(self._dense, labelled=True))
            self._classes[batch.index] = (logits if wanted is None else wanted).argmax(1).cpu()
        return logits.argmax(1).cpu() == self._classes[batch.index]


def sample_losses(model: nn.Module, batch: Batch, loss_fn: LossFn | None = None) -> list[float]:
    """Return the loss of each sample; a single loss if the batch cannot be cut. [samples]

    Raises:
        CalibrationError: There are no labels, and the model gives no loss.
    """
    with torch.no_grad():
        return _sample_losses(model, batch, loss_fn)


def _sample_losses(model: nn.Module, batch: Batch, loss_fn: LossFn | None) -> list[float]:
    pieces = batch.cut(batch.size)
    if loss_fn is not None:
        return [float(own_loss(loss_fn, model, piece.raw)) for piece in pieces]
    if not isinstance(batch.raw, Mapping) and len(pieces) > 1:
        logits = logits_of(batch.run(model, labelled=True))
        if logits is not None and len(logits) == batch.size:
            return [float(default_loss(row[None], p)) for row, p in zip(logits, pieces, strict=True)]
    return [float(default_loss(piece.run(model, labelled=True), piece)) for piece in pieces]


def _drop(before: Values, after: Values) -> Row:
    """Return each sample's contribution to the drop of a mean. [samples]"""
    if (before.below == 1).all() and (after.below == 1).all():
        return before.above - after.above
    return before.shares - after.shares


def _exp_minus_one(value: float) -> float:
    return float(np.expm1(value))


def _checked(found: Any, batch: Batch) -> Values:
    """Check what a metric returned.

    Raises:
        SettingError: It is not one finite number for each sample, nor numerators and counts of at least 0.
    """
    pair = found if isinstance(found, tuple) and len(found) == 2 else (found, np.ones(batch.size))
    rows: list[Row] = []
    for row in pair:
        try:
            row = np.asarray(row.detach().cpu() if isinstance(row, Tensor) else row, dtype=np.float64)
        except (TypeError, ValueError):
            row = np.zeros(0)
        if row.ndim != 1 or len(row) != batch.size or not np.isfinite(row).all():
            raise SettingError(
                f"metric: expected one finite number for each of {batch.size} samples, or a tuple of two "
                f"such rows, numerators and counts, got {row.shape if row.size else type(found).__name__}. "
                "Return a tensor [samples]."
            )
        rows.append(row)
    if (rows[1] < 0).any():
        raise SettingError(
            f"metric: expected counts of at least 0, got {rows[1].min():.4g}. Return numerators and counts, "
            "with the sign in the numerators."
        )
    return Values(*rows)
