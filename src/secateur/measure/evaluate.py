"""`sc.evaluate`: measure a model's loss and accuracy, or the distance of its outputs to another model's."""

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
    """The quality of a model: means over samples.

    Attributes:
        loss: Mean loss; without labels or `loss_fn`, the distance to the dense model's outputs,
            sum ||a - b||^2 / sum ||b||^2. For models that read and write words, the mean of the samples'
            Kullback-Leibler divergences of the words' probabilities from the dense model's.
        accuracy: Top-1 accuracy in [0, 1]; None if samples do not have one class each.
        samples: Number of samples.
        measure: What `loss` is, a key of `MEASURES`.
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
    """Measure a model in evaluation mode. It is not changed.

    Args:
        model: Any module.
        data: Anything that `Calibration.of` accepts. Views are not used.
        dense: The model whose outputs are taken as correct if the data have no labels.
        loss_fn: As for `score`.
        forward: As for `score`.
        progress: Show a bar on a terminal.
        description: Title of the bar.

    Raises:
        CalibrationError: The data have no labels, and neither `loss_fn` nor `dense` is given.
        SettingError: It is called inside `torch.autocast`, or with the meta device as default.

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
    """Return the floating tensors in a model's output on a batch, to compute a distance.

    In tensors with an axis of positions, [samples, positions, ...], padding is set to zero and so ignored.
    """
    padding = batch.padding
    return [padding.hide(tensor) for tensor in tensors_of(output) if tensor.is_floating_point()]


_ENTRIES = 1 << 22
"""Numbers that are compared at once: the logits of a language model take hundreds of megabytes."""


def squared_distance(
    mine: Sequence[Tensor], theirs: Sequence[Tensor], size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return the squared distance of outputs to those of the dense model, and the squared size of these.

    Args:
        mine: The model's outputs, from `floats_of`.
        theirs: The dense model's outputs.
        size: Number of samples, for a distance of each sample; None for one distance of all outputs.

    Returns:
        Distance and size of each sample [size], from the outputs with an axis of samples. If there is none,
        or `size` is None, those of all outputs together [1]. The distance is infinite if one model gives a
        number where the other gives none.
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
    """Whether each labelled sample's largest logit is at its label. bool [labelled samples]

    None if the rows of the logits do not have one class each.
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
