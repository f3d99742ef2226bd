"""Batch-norm re-estimation: running statistics measured anew on calibration data.

Removing units changes the inputs of the batch norms behind them, whose stored mean and variance then
no longer fit. One pass over unlabelled data measures them again.
"""

from __future__ import annotations

import torch
from torch import nn

from secateur.calibration import Calibration
from secateur.errors import CalibrationError
from secateur.models import device_of, evaluating


def batch_norms(model: nn.Module) -> list[nn.modules.batchnorm._NormBase]:
    """The layers that hold running statistics."""
    return [
        layer
        for layer in model.modules()
        if isinstance(layer, nn.modules.batchnorm._NormBase) and layer.running_mean is not None
    ]


def reestimate(model: nn.Module, calibration: Calibration, *, progress: bool = False) -> None:
    """Measure running means and variances again, in place.

    Each layer's statistics become the average over batches of the batch statistics, all batches
    weighing the same. A single sample has no variance (nor does PyTorch take one, unless it is a map), so
    batches of one, such as the rest of a loader, are left out where there are larger ones.

    Args:
        model: A model with batch norms; dropout stays off.
        calibration: Inputs; labels are not read.
        progress: Show a bar on a terminal.

    Raises:
        CalibrationError: If a layer sees one value a channel in every batch.
    """
    layers = batch_norms(model)
    with evaluating(model), torch.no_grad():
        try:
            for layer in layers:
                layer.reset_running_stats()
                layer.momentum = None  # a plain average over batches
                layer.train()
            data, seen = calibration.to(device_of(model)), 0
            for batch in data.batches("Batch norm", progress):
                if batch.size > 1:
                    batch.run(model)
                    seen += 1
            if not seen:
                for batch in data.batches("Batch norm", progress):
                    batch.run(model)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise CalibrationError(
                f"batch norm: expected more than one value a channel in a batch, got one ({error}). "
                f"Give larger batches."
            ) from error
        found = [[buffer.clone() for buffer in layer.buffers()] for layer in layers]
    with torch.no_grad():
        for layer, values in zip(layers, found, strict=True):
            for buffer, value in zip(layer.buffers(), values, strict=True):
                buffer.copy_(value)
