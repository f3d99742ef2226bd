"""How well a model does on data: loss and top-1, or how far its outputs are from another model's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.calibration import Batch, Calibration, Forward, is_soft
from secateur.calibration.batch import IGNORED, held_tensors
from secateur.common.models import device_of, evaluating
from secateur.common.modes import require_plain_modes
from secateur.common.outputs import tensors_of
from secateur.measure.divergence import class_scores, diverged, reads_and_writes_words
from secateur.measure.measures import DISTANCE, DIVERGENCE, LOSS
from secateur.signals.loss import LossFn, default_loss, logits_of, one_number, own_loss


@dataclass(frozen=True)
class Evaluation:
    """Means over samples.

    Attributes:
        loss: Mean loss; without labels or `loss_fn`, the distance to the dense model's outputs,
            sum ||a - b||^2 / sum ||b||^2. For models that read and write words, the mean of the samples'
            Kullback-Leibler divergences of the words' probabilities from the dense model's.
        accuracy: Top-1 in [0, 1]; None where there is no class for each sample.
        samples: How many were seen.
        measure: What `loss` holds, a key of `MEASURES`.
    """

    loss: float
    accuracy: float | None
    samples: int
    measure: str = LOSS


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
        data: What `Calibration.of` takes; of a Calibration with views each sample as it is.
        dense: The model whose outputs count as right where the data holds no labels.
        loss_fn: As for `score`.
        forward: As for `score`.
        progress: Show a bar on a terminal.
        description: Its title.

    Raises:
        CalibrationError: If the data has no labels and neither `loss_fn` nor `dense` is given.
        SettingError: If it is called in `torch.autocast`, or with the meta device as default.

    Example:
        >>> import torch
        >>> import secateur as sc
        >>> model = torch.nn.Identity()
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0], [2.0, 0.0]])
        >>> sc.evaluate(model, [(logits, torch.tensor([0, 1, 0, 1]))]).accuracy
        0.75
    """
    require_plain_modes("evaluate", model, gradients=False)
    calibration = Calibration.of(data, forward=forward, model=model).plain.to(device_of(model))
    loss, right, classed, samples, scale = 0.0, 0, 0, 0, 0.0
    measure = LOSS
    with evaluating(model, fast_path=True), torch.no_grad():
        for batch in calibration.batches(description, progress):
            samples += batch.size
            if loss_fn is not None:
                loss += float(one_number(own_loss(loss_fn, model, batch.raw))) * batch.size
                continue
            output = batch.run(model, labelled=True)
            if dense is not None and not _has_loss(output, batch):
                with evaluating(dense, fast_path=True):
                    wanted = batch.run(dense, labelled=True)
                if reads_and_writes_words(held_tensors((batch.args, batch.kwargs)), wanted):
                    measure = DIVERGENCE
                    loss += sum(diverged(class_scores(output), class_scores(wanted), batch))
                    continue
                measure = DISTANCE
                error, norm = squared_distance(floats_of(output, batch), floats_of(wanted, batch))
                loss, scale = loss + float(error.sum()), scale + float(norm.sum())
                continue
            loss += float(default_loss(output, batch)) * batch.size
            found = hits(output, batch)
            if found is not None:
                right, classed = right + int(found.sum()), classed + len(found)
    if measure != DISTANCE:
        scale = float(samples)
    return Evaluation(loss / (scale or 1.0), right / classed if classed else None, samples, measure)


def _has_loss(output: Any, batch: Batch) -> bool:
    own = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    return batch.labels is not None or own is not None


def floats_of(output: Any, batch: Batch) -> list[Tensor]:
    """The tensors of numbers in a model's output on a batch, which a distance is taken of.

    In those with an axis of positions, [samples, positions, ...], padding is zero: there, models may differ.
    """
    padding = batch.padding
    return [padding.hide(tensor) for tensor in tensors_of(output) if tensor.is_floating_point()]


_ENTRIES = 1 << 22
"""Numbers that are compared at a time: the logits of a language model take hundreds of megabytes."""


def squared_distance(
    mine: Sequence[Tensor], theirs: Sequence[Tensor], size: int | None = None
) -> tuple[Tensor, Tensor]:
    """How far outputs are from those of the dense model, and how large these are, as sums of squares.

    Args:
        mine: From `floats_of`, of any model.
        theirs: Of the dense model.
        size: Samples in the batch, for one distance a sample; None for one of all outputs.

    Returns:
        Distance and size of each sample, by the outputs that are rows of samples [size]; where there is none,
        or no `size` was given, of all outputs [1]. The distance is infinite where one model gives a number
        and the other none.
    """
    by_row = [(a, b) for a, b in zip(mine, theirs, strict=True) if b.ndim and len(b) == size]
    pairs = by_row or list(zip(mine, theirs, strict=True))
    rows = size if size and by_row else 1
    error, norm = torch.zeros(rows, dtype=torch.float64), torch.zeros(rows, dtype=torch.float64)
    for pair in pairs:
        mine_, theirs_ = (t.reshape(rows, -1) for t in torch.broadcast_tensors(*pair))
        step = max(1, _ENTRIES // rows)
        for a, b in zip(mine_.split(step, 1), theirs_.split(step, 1), strict=True):
            finite = torch.isfinite(b)  # masks may hold minus infinity, in both alike
            alike = (a == b) | (a.isnan() & b.isnan())
            apart = torch.where(finite, a - b, torch.where(alike, 0.0, torch.inf))
            error += apart.double().square().sum(1).cpu()
            norm += torch.where(finite, b, 0.0).double().square().sum(1).cpu()
    return torch.nan_to_num(error, nan=torch.inf, posinf=torch.inf), norm


def hits(output: Any, batch: Batch) -> Tensor | None:
    """Whether the largest logit of each row is at its label, for rows that have one. bool [labelled samples]

    None where there is no class for each row of the logits.
    """
    logits = logits_of(output)
    labels = batch.labels
    if logits is None or logits.ndim != 2 or labels is None:
        return None
    if labels.shape == logits.shape and is_soft(labels):
        labels = labels.argmax(1)
    if labels.shape != logits.shape[:1] or labels.is_floating_point():
        return None
    return (logits.argmax(1) == labels)[labels != IGNORED]
