"""Second-order update of masked linear layers: what is left makes up for what went."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from secateur.calibration import Calibration, seeded
from secateur.errors import SettingError
from secateur.masks.apply import masked_layers
from secateur.masks.blocks import Chain, lists_of
from secateur.masks.offload import input_device, store, stored
from secateur.masks.plan import MaskPlan
from secateur.masks.weights import Layer, layers_of
from secateur.models import evaluating, unwrap
from secateur.progress import bar
from secateur.regression.leastsquares import add_products

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
    by_block: bool = True,
    progress: bool = False,
) -> tuple[str, ...]:
    """Update the linear layers of a masked model, in place, one after another, with `update`.

    Each layer's second moments are those of what it reads in the masked model after the layers before it
    have been updated, with memory for one layer's moments. In a language model, or any other chain of alike
    blocks, that is one pass of all the data through the layer's block, and one more to reach the next block;
    what is held of the data are the hidden states between two blocks (`secateur.masks.blocks`). Any other
    model is run whole for each layer; both give the same up to rounding. Convolutions are left as they are;
    `sc.repair` refits those by least squares, which for small layers is the exact answer.

    Args:
        small: What `apply` returned.
        model: The dense model, whose weights the update starts from; it is left as it was.
        plan: Its masks.
        calibration: What `Calibration.of` takes; labels are not read.
        damping: Relative to the mean of the moments' diagonal, above 0.
        by_block: False runs the whole model for each layer, whatever it is, and holds no hidden states.
        progress: Show a bar on a terminal.

    Returns:
        The names of the weights that were updated.

    Raises:
        PlanError: The plan is of another model.
        SettingError: `damping` is not above 0, or the weights lie where nothing can be written.
        CalibrationError: There is no data.
    """
    if not damping > 0:
        raise SettingError(f"surgeon: expected damping above 0, got {damping!r}. Write damping=0.01.")
    small, model = unwrap(small), unwrap(model)
    data, device = Calibration.of(calibration, model=small), input_device(small)
    data = data if device is None else data.to(device)
    tasks = _tasks(small, model, plan)
    done: list[str] = []

    def set_right(some: Sequence[_Task], run: Callable[[], None]) -> None:
        for task in bar(some, "second order", progress):
            hessian = _moments(task.readers, run)
            if bool(task.keep.all()) or not bool(torch.isfinite(hessian).all()) or not hessian.any():
                continue
            hessian.diagonal().add_(damping * float(hessian.diagonal().mean()))
            store(task.readers[0], update(stored(task.dense), task.keep, hessian))
            done.append(task.name)

    def whole() -> None:
        for batch in data.batches():
            batch.run(small)

    with seeded(0), evaluating(small):
        for blocks in lists_of(small) if by_block else []:
            parts = _by_block(tasks, blocks)
            if parts is None:
                continue
            before, inside, behind = parts
            set_right(before, whole)
            tasks = [task for task in tasks if task not in before]
            chain = Chain.of(small, data, blocks)
            if chain is None:
                continue
            for some in inside:
                set_right(some, chain.visit)
                chain.advance()
            set_right(behind, partial(chain.finish, data))
            return tuple(done)
        set_right(tasks, whole)
    return tuple(done)


@dataclass(frozen=True, eq=False)
class _Task:
    """A weight to update.

    Attributes:
        name: In the state dict.
        readers: The layers that read it.
        dense: The layer of the dense model that has it.
        keep: Its mask.
    """

    name: str
    readers: list[Layer]
    dense: nn.Module
    keep: Tensor


def _tasks(small: nn.Module, model: nn.Module, plan: MaskPlan) -> list[_Task]:
    """The masked weights that only linear layers read, in the plan's order."""
    readers = layers_of(small)
    masked = zip(plan.masks, masked_layers(small, plan), strict=True)
    return [
        _Task(name, readers[name], model.get_submodule(name.rpartition(".")[0]), keep)
        for name, (_, _, keep) in masked
        if name in readers and isinstance(readers[name][0], nn.Linear)
    ]


def _by_block(
    tasks: Sequence[_Task], blocks: Sequence[nn.Module]
) -> tuple[list[_Task], list[list[_Task]], list[_Task]] | None:
    """What comes before the blocks, in each, and behind; None if a weight is read in several, or none is."""
    place = {id(layer): k for k, block in enumerate(blocks) for layer in block.modules()}
    before: list[_Task] = []
    inside: list[list[_Task]] = [[] for _ in blocks]
    behind: list[_Task] = []
    for task in tasks:
        found = {place.get(id(layer)) for layer in task.readers}
        if len(found) > 1:
            return None
        (k,) = found
        if k is not None:
            inside[k].append(task)
        else:
            (behind if any(inside) else before).append(task)
    return (before, inside, behind) if any(inside) else None


def _moments(layers: Sequence[Layer], run: Callable[[], None]) -> Tensor:
    """The sum of x x^T over all that the layers read in a run. [inputs, inputs]"""
    columns = int(layers[0].weight.shape[1])
    sums: list[Tensor] = []

    def see(module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0].detach().reshape(-1, columns).double()
        if not sums:
            sums.append(torch.zeros(columns, columns, dtype=torch.float64, device=x.device))
        add_products(sums[0][None], x[None])

    handles = [layer.register_forward_pre_hook(see) for layer in layers]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return sums[0] if sums else torch.zeros(columns, columns, dtype=torch.float64)
