"""Batch-norm re-estimation: measure the running statistics again on calibration data.

Removing units changes the inputs of the batch norms that follow. Their stored mean and variance then no
longer fit. One pass over unlabelled data measures them again.
"""

from __future__ import annotations

import torch
from torch import nn

from secateur.calibration import Calibration
from secateur.common.models import device_of, evaluating
from secateur.errors import CalibrationError


def batch_norms(model: nn.Module) -> list[nn.modules.batchnorm._NormBase]:
    """Return the batch-norm (or instance-norm) layers of a model that hold running statistics."""
    return [
        layer
        for layer in model.modules()
        if isinstance(layer, nn.modules.batchnorm._NormBase) and layer.running_mean is not None
    ]


def reestimate(model: nn.Module, calibration: Calibration, *, progress: bool = False) -> None:
    """Measure the running mean and variance of every batch norm again. The model is changed in place.

    The new statistics of a layer are the plain average of its batch statistics over all batches. Batches
    of one sample (often the last of a loader) are skipped if there are larger ones: one sample has no
    variance, and PyTorch refuses it unless it is a feature map.

    Args:
        model: A model with batch norms. Dropout stays off.
        calibration: Inputs. Labels are not read.
        progress: Show a progress bar on a terminal.

    Raises:
        CalibrationError: If a layer gets only one value per channel in every batch.
    """
    layers = batch_norms(model)
    with evaluating(model), torch.no_grad():
        try:
            for layer in layers:
                layer.reset_running_stats()
                layer.momentum = None  # a plain average over batches
                layer.train()
            data, seen = calibration.to_weights(device_of(model)), 0
            for batch in data.batches("Batch norm", progress):
                if batch.size > 1:
                    batch.run(model)
                    seen += 1
            if not seen:  # every batch has one sample
                for batch in data.batches("Batch norm", progress):
                    batch.run(model)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise CalibrationError(
                f"batch norm: expected more than one value a channel in a batch, got one ({error}). "
                f"Give larger batches."
            ) from error
        # `evaluating` restores the old buffers when it ends, so the new values are copied out here
        # and written back afterwards.
        found = [[buffer.clone() for buffer in layer.buffers()] for layer in layers]
    with torch.no_grad():
        for layer, values in zip(layers, found, strict=True):
            for buffer, value in zip(layer.buffers(), values, strict=True):
                buffer.copy_(value)
