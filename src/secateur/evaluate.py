"""How well a model does on data: loss and top-1, or distance to another model's outputs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from secateur.calibration import Batch, Calibration, Forward, is_soft
from secateur.calibration.batch import IGNORED
from secateur.models import device_of, evaluating
from secateur.outputs import tensors_of
from secateur.score.loss import LossFn, default_loss, logits_of


@dataclass(frozen=True)
class Evaluation:
    """Means over samples.

    Attributes:
        loss: Mean loss; without labels or `loss_fn`, the distance to the dense model's outputs,
            sum ||a - b||^2 / sum ||b||^2.
        accuracy: Top-1 in [0, 1]; None where there is no class for each sample.
        samples: How many were seen.
        measure: ``loss`` or ``distance to dense``: what `loss` holds.
    """

    loss: float
    accuracy: float | None
    samples: int
    measure: str = "loss"


def evaluate(
    model: nn.Module,
    data: Any,
    *,
    dense: nn.Module | None = None,
    loss_fn: LossFn | None = None,
    forward: Forward | None = None,
    progress: bool = False,
    description: str = "Evaluating",
) -> Evaluation:
    """Measure a model in evaluation mode; it is left as it was.

    Args:
        model: Any module.
        data: What `Calibration.of` takes.
        dense: The model whose outputs count as right where the data holds no labels.
        loss_fn: As for `score`.
        forward: As for `score`.
        progress: Show a bar on a terminal.
        description: Its title.

    Raises:
        CalibrationError: If the data has no labels and neither `loss_fn` nor `dense` is given.

    Example:
        >>> import torch
        >>> import secateur as sc
        >>> model = torch.nn.Identity()
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0], [2.0, 0.0]])
        >>> sc.evaluate(model, [(logits, torch.tensor([0, 1, 0, 1]))]).accuracy
        0.75
    """
    calibration = Calibration.of(data, forward=forward, model=model).to(device_of(model))
    loss, right, classed, samples, scale = 0.0, 0, 0, 0, 0.0
    measure = "loss"
    with evaluating(model, fast_path=True), torch.no_grad():
        for batch in calibration.batches(description, progress):
            samples += batch.size
            if loss_fn is not None:
                loss += float(loss_fn(model, batch.raw)) * batch.size
                continue
            output = batch.run(model, labelled=True)
            if dense is not None and not _has_loss(output, batch):
                measure = "distance to dense"
                with evaluating(dense, fast_path=True):
                    wanted = batch.run(dense, labelled=True)
                error, norm = _distance(output, wanted)
                loss, scale = loss + error, scale + norm
                continue
            loss += float(default_loss(output, batch)) * batch.size
            hits, counted = _top1(output, batch)
            right, classed = right + hits, classed + counted
    if measure == "loss":
        scale = float(samples)
    return Evaluation(loss / scale if scale else 0.0, right / classed if classed else None, samples, measure)


def _has_loss(output: Any, batch: Batch) -> bool:
    own = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    return batch.labels is not None or own is not None


def _distance(output: Any, wanted: Any) -> tuple[float, float]:
    error = norm = 0.0
    for a, b in zip(tensors_of(output), tensors_of(wanted), strict=True):
        if a.is_floating_point():
            finite = torch.isfinite(b)
            if not torch.equal(torch.isfinite(a), finite):
                return math.inf, 1.0
            error += float((a - b)[finite].double().square().sum())
            norm += float(b[finite].double().square().sum())
    return error, norm


def _top1(output: Any, batch: Batch) -> tuple[int, int]:
    """Hits and samples, where there is one class for each row of the logits."""
    logits = logits_of(output)
    labels = batch.labels
    if logits is None or logits.ndim != 2 or labels is None:
        return 0, 0
    if labels.shape == logits.shape and is_soft(labels):
        labels = labels.argmax(1)
    if labels.shape != logits.shape[:1] or labels.is_floating_point():
        return 0, 0
    counted = labels != IGNORED
    return int((logits.argmax(1) == labels)[counted].sum()), int(counted.sum())
