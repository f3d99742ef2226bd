"""Second-order repair of masked linear layers: the kept weights compensate for the removed ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from secateur.calibration import Calibration, seeded
from secateur.calibration.padding import running_padding
from secateur.common.models import evaluating, unwrap
from secateur.common.offload import input_device, store, stored
from secateur.common.progress import bar
from secateur.errors import SettingError
from secateur.repairs.regression.leastsquares import add_products
from secateur.targets.weights.apply import masked_layers
from secateur.targets.weights.blocks import Chain, lists_of
from secateur.targets.weights.plan import MaskPlan
from secateur.targets.weights.weights import Layer, layers_of

DAMPING = 1e-2
"""Added to the diagonal of the second moments, as a multiple of the diagonal's mean."""


def update(weight: Tensor, keep: Tensor, hessian: Tensor) -> Tensor:
    r"""Set masked weights to zero column by column, and let the later columns compensate for the error.

    Let H be the second moments of the inputs. A change δ of one row of the weight changes the layer's output
    by a squared error of ``δ H δ^T``. At column j, its masked entries become zero, and the later columns
    change by

    .. math:: \delta_{k > j} = - \frac{w_j}{[H_{\ge j}^{-1}]_{jj}} [H_{\ge j}^{-1}]_{j, k}

    This is the optimal brain surgeon's answer (Hassibi and Stork 1993) if the columns before j are fixed. All
    rows of the weight use the same inverses, and one Cholesky factor holds them all. Source: Frantar and
    Alistarh 2023, SparseGPT, arXiv 2301.00774. Here the mask is given and not chosen on the way.

    Args:
        weight: The dense weight. [outputs, inputs]
        keep: True for weights that stay. [outputs, inputs]
        hessian: H, symmetric and positive definite. [inputs, inputs]

    Returns:
        The new weight, zero where masked, float64. [outputs, inputs]
    """
    found = weight.double().clone()
    # Write H^-1 = U^T U with U upper triangular. Let G be the inverse of H restricted to columns j and later.
    # Then row j of U is the first row of G divided by the square root of G's first entry. So one
    # factorisation replaces an inverse for each column.
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
    """Repair the linear layers of a masked model in place, one after another, with `update`.

    The second moments of a layer's inputs are measured in the masked model after all earlier layers were
    updated. Only the moments of one layer are in memory at a time. In a chain of blocks, such as a language
    model, the data pass once through the block for each layer and once more to reach the next block, and the
    hidden states between two blocks are kept (see `secateur.targets.weights.blocks`). Any other model runs as
    a whole for each layer. Both ways give the same result up to rounding. Convolutions are not changed;
    `sc.repair` refits them by least squares, which is exact for small layers.

    Args:
        small: The masked model, from `apply`.
        model: The dense model. The updates start from its weights. It is not changed.
        plan: The masks.
        calibration: Anything that `Calibration.of` takes. Labels are not read.
        damping: Added to the diagonal of the moments, as a multiple of its mean. Above 0.
        by_block: False: always run the whole model for each layer, and keep no hidden states.
        progress: Show a progress bar on a terminal.

    Returns:
        The names of the updated weights.

    Raises:
        PlanError: The plan was made for another model.
        SettingError: `damping` is not above 0, or the weights are offloaded to disk.
        CalibrationError: There is no data.
    """
    if not damping > 0:
        raise SettingError(f"surgeon: expected damping above 0, got {damping!r}. Write damping=0.01.")
    small, model = unwrap(small), unwrap(model)
    data, device = Calibration.of(calibration, model=small), input_device(small)
    data = data if device is None else data.to(device)
    tasks = _tasks(small, model, plan)
    done: list[str] = []

    def update_each(some: Sequence[_Task], run: Callable[[], None]) -> None:
        for task in bar(some, "second order", progress):
            hessian = _moments(task.readers, run)
            if bool(task.keep.all()) or not bool(torch.isfinite(hessian).all()) or not hessian.any():
                continue
            hessian.diagonal().add_(damping * float(hessian.diagonal().mean()))
            store(task.readers[0], update(stored(task.dense), task.keep, hessian))
            done.append(task.name)

    def run_model() -> None:
        for batch in data.batches():
            batch.run(small)

    with seeded(0), evaluating(small):
        for blocks in lists_of(small) if by_block else []:
            parts = _split_by_block(tasks, blocks)
            if parts is None:
                continue
            before, inside, after = parts
            update_each(before, run_model)
            tasks = [task for task in tasks if task not in before]
            chain = Chain.of(small, data, blocks)
            if chain is None:
                continue
            for some in inside:
                update_each(some, chain.visit)
                chain.advance()
            update_each(after, partial(chain.finish, data))
            return tuple(done)
        update_each(tasks, run_model)
    return tuple(done)


@dataclass(frozen=True, eq=False)
class _Task:
    """One weight to update.

    Attributes:
        name: Its name in the state dict.
        readers: The layers of the masked model that use it; more than one if it is shared.
        dense: The layer of the dense model that holds its original values.
        keep: Its mask, True for weights that stay. [outputs, inputs]
    """

    name: str
    readers: list[Layer]
    dense: nn.Module
    keep: Tensor


def _tasks(small: nn.Module, model: nn.Module, plan: MaskPlan) -> list[_Task]:
    """The masked weights of linear layers, in the plan's order."""
    readers = layers_of(small)
    masked = zip(plan.masks, masked_layers(small, plan), strict=True)
    return [
        _Task(name, readers[name], model.get_submodule(name.rpartition(".")[0]), keep)
        for name, (_, _, keep) in masked
        if name in readers and isinstance(readers[name][0], nn.Linear)
    ]


def _split_by_block(
    tasks: Sequence[_Task], blocks: Sequence[nn.Module]
) -> tuple[list[_Task], list[list[_Task]], list[_Task]] | None:
    """Sort weights by where they are used.

    Returns:
        The weights before the blocks, those in each block, and those after the blocks. None if a weight is
        used in more than one of these places, or no weight is inside a block.
    """
    place = {id(layer): k for k, block in enumerate(blocks) for layer in block.modules()}
    before: list[_Task] = []
    inside: list[list[_Task]] = [[] for _ in blocks]
    after: list[_Task] = []
    for task in tasks:
        found = {place.get(id(layer)) for layer in task.readers}
        if len(found) > 1:
            return None
        (k,) = found
        if k is not None:
            inside[k].append(task)
        else:
            (after if any(inside) else before).append(task)
    return (before, inside, after) if any(inside) else None


def _moments(layers: Sequence[Layer], run: Callable[[], None]) -> Tensor:
    """Sum x x^T over all inputs x of the layers while `run` runs the model. float64 [inputs, inputs]"""
    columns = int(layers[0].weight.shape[1])
    sums: list[Tensor] = []

    def see(module: nn.Module, args: tuple[Any, ...]) -> None:
        x = running_padding().matrix(args[0].detach()).double()
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
