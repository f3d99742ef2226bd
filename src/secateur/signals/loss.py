"""The loss whose gradients signals read, where the user gives none."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.calibration import Batch, is_soft
from secateur.calibration.batch import IGNORED
from secateur.calibration.padding import running
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


def one_number(loss: Any, *, differentiable: bool = False) -> Tensor:
    """The mean loss of a batch, once it is known to be one.

    Args:
        loss: What a `LossFn` returned.
        differentiable: Whether its gradient is needed.

    Raises:
        CalibrationError: It is not one real, finite number, or has no gradient.
    """
    if isinstance(loss, int | float) and not differentiable:
        loss = torch.tensor(float(loss))
    if not isinstance(loss, Tensor) or loss.numel() != 1 or loss.is_complex():
        got = f"{loss.dtype} {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise CalibrationError(
            f"loss: expected a tensor of one real number, the batch's mean loss, got {got}. Average it."
        )
    if not bool(torch.isfinite(loss)):
        raise CalibrationError(
            f"loss: expected a finite number, got {loss.item()}. Check the data, and the model for overflow."
        )
    if differentiable and not loss.requires_grad:
        raise CalibrationError(
            "loss: expected one that depends on the model's parameters, got a constant. Compute it "
            "from the model's output, without detach or no_grad."
        )
    return loss.reshape(())


def check_reached(gradients: Sequence[Tensor | None]) -> None:
    """Raise CalibrationError if a loss has a gradient, but of nothing in the model."""
    if gradients and all(found is None for found in gradients):
        raise CalibrationError(
            "loss: expected one that depends on the model's parameters, got one of something else. Compute "
            "it from what model(...) returned in this call."
        )


def loss_of(model: Any, batch: Batch, loss_fn: LossFn | None) -> Tensor:
    """The mean loss of one batch, with a gradient: by the user's function, or `default_loss`.

    Args:
        model: The model, or what the user's code calls in its place.
        batch: The batch.
        loss_fn: The user's function.

    Raises:
        CalibrationError: See `one_number` and `default_loss`.
    """
    if loss_fn is None:
        loss = default_loss(batch.run(model, labelled=True), batch)
    else:
        with running(batch.padding):
            loss = own_loss(loss_fn, model, batch.raw)
    return one_number(loss, differentiable=True)


def own_loss(loss_fn: LossFn, model: Any, raw: Any) -> Any:
    """What the user's function returns for a batch as the loader gave it.

    Raises:
        CalibrationError: It is one of PyTorch's own losses, which take outputs and labels.
    """
    if isinstance(loss_fn, nn.Module) or str(getattr(loss_fn, "__module__", "")).startswith("torch."):
        name = getattr(loss_fn, "__name__", type(loss_fn).__name__)
        raise CalibrationError(
            f"loss_fn: expected a function of the model and a batch, got {name}, which takes outputs and "
            f"labels. Write loss_fn=lambda model, batch: {name}(model(batch[0]), batch[1]), for example."
        )
    return loss_fn(model, raw)


def default_loss(output: Any, batch: Batch) -> Tensor:
    """The output's own `loss` for a mapping batch; otherwise the loss that fits the labels.

    That is the mean cross-entropy of logits and classes, also of one-hot and soft labels (rows of numbers
    that add up to one); and the mean squared error of the output and floating labels of its shape.

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
            "Pass loss_fn(model, batch)."
        )
    labels = batch.labels
    if labels is None:
        raise CalibrationError(
            "loss: expected labels, got none. Pass batches (inputs, labels), or loss_fn(model, batch)."
        )
    if labels.is_floating_point() and labels.numel() == logits.numel() and logits.shape[-1] == 1:
        labels = labels.reshape(logits.shape)  # a number a sample
    if labels.shape == logits.shape and is_soft(labels):
        return F.cross_entropy(logits, labels.to(logits.dtype))
    if labels.shape == logits.shape and labels.is_floating_point():
        if bool(((labels == 0) | (labels == 1)).all()):
            raise CalibrationError(
                "loss: expected classes, or numbers to predict, got floating labels of zeros and ones alone. "
                "Pass loss_fn, for instance lambda model, batch: "
                "F.binary_cross_entropy_with_logits(model(batch[0]), batch[1])."
            )
        return F.mse_loss(logits, labels.to(logits.dtype))
    dense = [logits.shape[0], *logits.shape[2:]]
    if labels.is_floating_point() or logits.ndim < 2 or list(labels.shape) != dense:
        raise CalibrationError(
            f"loss: expected integer labels {dense}, or floating ones of the shape of the logits "
            f"{list(logits.shape)}, got {labels.dtype} {list(labels.shape)}. Pass loss_fn(model, batch), or "
            "check that inputs and labels belong together."
        )
    labels = labels.long()
    check_label_range(labels, logits)
    if bool((labels == IGNORED).all()):
        return logits.sum() * 0  # the mean of no samples would be NaN
    return F.cross_entropy(logits, labels)


def loss_name(loss_fn: LossFn | None, batch: Batch) -> str:
    """What the loss is, for a report."""
    if loss_fn is not None:
        return str(getattr(loss_fn, "__qualname__", type(loss_fn).__name__))
    labels = batch.labels
    if labels is None or batch.extra is not None or not labels.is_floating_point():
        return "default"
    return "cross-entropy of soft labels" if is_soft(labels) else "mean squared error, for floating labels"


def check_label_range(labels: Tensor, logits: Tensor) -> None:
    """Raise CalibrationError if a label is neither `IGNORED` nor a class of `logits` [B, K, ...]."""
    count = logits.shape[1]
    wrong = labels[((labels < 0) & (labels != IGNORED)) | (labels >= count)]
    if len(wrong):
        raise CalibrationError(
            f"labels: expected classes from 0 to {count - 1}, which the model tells apart, got label "
            f"{int(wrong[0])}. Check the labels, or pass loss_fn if the output is no set of logits."
        )
