"""Second-order update of masked linear layers: what is left makes up for what went."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from secateur.calibration import Calibration, seeded
from secateur.errors import SettingError
from secateur.masks.apply import masked_tensors
from secateur.masks.plan import MaskPlan
from secateur.masks.weights import Layer, layers_of
from secateur.models import device_of, evaluating, unwrap
from secateur.repair.progress import bar

DAMPING = 1e-2
"""Added to the diagonal of the inputs' second moments, relative to its mean."""


def update(weight: Tensor, keep: Tensor, hessian: Tensor) -> Tensor:
    r"""Zeroes masked weights column by column; the columns behind each make up for its error.

    With H the second moments of the inputs, the loss that a change δ of a row adds is ``δ H δ^T``. When
    column j is reached, the weights of its masked entries go to zero, and those behind change by

    .. math:: \delta_{k > j} = - \frac{w_j}{[H_{\ge j}^{-1}]_{jj}} [H_{\ge j}^{-1}]_{j, k}

    the optimal brain surgeon's answer (Hassibi and Stork 1993) with all columns before j fixed. All rows
    share the inverses, which are the rows of one Cholesky factor. Source: Frantar and Alistarh 2023,
    SparseGPT, arXiv 2301.00774, with a given mask.

    Args:
        weight: [outputs, inputs]
        keep: True for what stays. [outputs, inputs]
        hessian: H, symmetric and positive definite. [inputs, inputs]

    Returns:
        The new weight, zero where masked, in float64.
    """
    found = weight.double().clone()
    # With H^-1 = U^T U, row j of U is row j of the inverse of H without the columns before j, over the root
    # of its first entry.
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian.double()))
    upper = torch.linalg.cholesky(inverse, upper=True)
    for j in range(found.shape[1]):
        error = torch.where(keep[:, j], 0.0, found[:, j] / upper[j, j])
        found[:, j:] -= error[:, None] * upper[j, j:]
        found[:, j] = torch.where(keep[:, j], found[:, j], 0.0)
    return found


@torch.no_grad()
def surgeon(
    small: nn.Module,
    model: nn.Module,
    plan: MaskPlan,
    calibration: Any,
    *,
    damping: float = DAMPING,
    progress: bool = False,
) -> tuple[str, ...]:
    """Update the linear layers of a masked model, in place, one after another, with `update`.

    Each layer's second moments are those of what it reads in the masked model after the layers before it have
    been updated: one pass over the data a layer, and memory for one layer's moments. Convolutions are left as
    they are; `sc.repair` refits those by least squares, which for small layers is the exact answer.

    Args:
        small: What `apply` returned.
        model: The dense model, whose weights the update starts from; it is left as it was.
        plan: Its masks.
        calibration: What `Calibration.of` takes; labels are not read.
        damping: Relative to the mean of the moments' diagonal, above 0.
        progress: Show a bar on a terminal.

    Returns:
        The names of the weights that were updated.

    Raises:
        PlanError: The plan is of another model.
        SettingError: `damping` is not above 0.
        CalibrationError: There is no data.
    """
    if not damping > 0:
        raise SettingError(f"surgeon: expected damping above 0, got {damping!r}. Write damping=0.01.")
    small = unwrap(small)
    data = Calibration.of(calibration).to(device_of(small))
    readers, dense = layers_of(small), dict(unwrap(model).named_parameters())
    linear = [
        (name, weight, keep)
        for name, weight, keep in masked_tensors(small, plan)
        if name in readers and isinstance(readers[name][0], nn.Linear)
    ]
    done = []
    for name, weight, keep in bar(linear, "second order", progress):
        hessian = _moments(small, readers[name], data)
        if bool(keep.all()) or not bool(torch.isfinite(hessian).all()) or not hessian.any():
            continue
        hessian.diagonal().add_(damping * float(hessian.diagonal().mean()))
        weight.copy_(update(dense[name].to(weight.device), keep, hessian))
        done.append(name)
    return tuple(done)


def _moments(model: nn.Module, layers: Sequence[Layer], data: Calibration) -> Tensor:
    """The sum of x x^T over all that the layers read. [inputs, inputs]"""
    columns = int(layers[0].weight.shape[1])
    found = torch.zeros(columns, columns, dtype=torch.float64, device=device_of(model))

    def see(module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0].detach().reshape(-1, columns).double()
        found.addmm_(x.t(), x)

    handles = [layer.register_forward_pre_hook(see) for layer in layers]
    try:
        with seeded(0), evaluating(model):
            for batch in data.batches():
                model(*batch.args, **batch.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return found
