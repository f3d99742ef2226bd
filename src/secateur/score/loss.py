"""The loss whose gradients signals read, where the user gives none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from secateur.calibration import Batch
from secateur.errors import CalibrationError

LossFn = Callable[[Callable[..., Any], Any], Tensor]
"""``loss_fn(model, batch)``: the mean loss of one batch. `model` is called like the user's own; `batch` is
what the loader gave, on the model's device."""


def logits_of(output: Any) -> Tensor | None:
    """The model's class scores: the output itself, or its `logits`."""
    if isinstance(output, Tensor):
        return output
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    return logits if isinstance(logits, Tensor) else None


def default_loss(output: Any, batch: Batch) -> Tensor:
    """The output's own `loss` for a mapping batch; otherwise the mean cross-entropy of logits and labels.

    Raises:
        CalibrationError: The output or the labels do not allow that; the message says what to do.
    """
    if isinstance(batch.raw, Mapping):
        own = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if isinstance(own, Tensor):
            return own
    logits = logits_of(output)
    if logits is None:
        raise CalibrationError(
            f"loss: expected the model to return logits, got {type(output).__name__}. "
            "Do pass loss_fn(model, batch)."
        )
    labels = batch.labels
    if labels is None:
        raise CalibrationError(
            "loss: expected labels, got none. Do give batches (inputs, labels), or pass loss_fn."
        )
    dense = [logits.shape[0], *logits.shape[2:]]
    if labels.is_floating_point() or logits.ndim < 2 or list(labels.shape) != dense:
        raise CalibrationError(
            f"loss: expected integer labels {dense} for logits {list(logits.shape)}, got {labels.dtype} "
            f"{list(labels.shape)}. Do pass loss_fn(model, batch), or check that inputs and labels belong "
            "together."
        )
    labels = labels.long()
    check_label_range(labels, logits)
    return F.cross_entropy(logits, labels)


def check_label_range(labels: Tensor, logits: Tensor) -> None:
    """Raise CalibrationError if a label is no class of `logits` [B, K, ...] (-100 marks what is ignored)."""
    count = logits.shape[1]
    wrong = labels[((labels < 0) & (labels != -100)) | (labels >= count)]
    if len(wrong):
        raise CalibrationError(
            f"labels: expected classes from 0 to {count - 1}, which the model tells apart, got label "
            f"{int(wrong[0])}. Do check the labels, or pass loss_fn if the output is no set of logits."
        )
