"""Add the same random numbers to the weights of a dense and of a pruned model."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from secateur.errors import ApplyError
from secateur.plan import Plan
from secateur.targets.units.compare import double_copy
from secateur.targets.units.tensors import cut, removed_positions, tensor_called


def with_other_weights(
    model: nn.Module, small: nn.Module, plan: Plan, size: float, seed: int = 0
) -> tuple[nn.Module, nn.Module]:
    """Return copies in float64, with the same random numbers added to the parameters of both.

    A factor of zero hides everything before it, for example the last norm of a residual block that starts as
    the identity. A correctly pruned model equals the masked one for any weights, also for these, which hide
    nothing.

    Args:
        model: The dense model.
        small: The pruned model. It gets the same numbers without the removed positions, so errors in it stay.
        plan: The plan that was applied.
        size: Size of the numbers, relative to the entries of the parameter.
        seed: Seed of the numbers.
    """
    dense, pruned = double_copy(model), double_copy(small)
    generator = torch.Generator().manual_seed(seed)
    removed = removed_positions(plan)
    changed: set[int] = set()
    for name, parameter in dense.named_parameters():
        noise = (
            torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * size * _size(parameter)
        )
        try:
            theirs = tensor_called(pruned, name)
        except ApplyError:  # folded into another tensor, or removed whole
            continue
        gone = removed.get(name, {})
        if theirs.shape == parameter.shape:
            share = noise.clone()
            for axis, positions in gone.items():  # the masked form has zeros there
                share.index_fill_(axis, torch.as_tensor(np.asarray(positions)), 0.0)
        else:
            share = cut(noise, gone)
        if share.shape != theirs.shape or id(theirs) in changed or not parameter.is_floating_point():
            continue
        changed.add(id(theirs))
        with torch.no_grad():
            theirs.add_(share.to(theirs.device))
            parameter.add_(noise.to(parameter.device))
    return dense, pruned


def _size(parameter: torch.Tensor) -> float:
    """Return the root mean square of the entries; if all are zero, the usual size of initial weights."""
    if not parameter.numel():
        return 0.0
    own = float(parameter.detach().abs().square().mean().sqrt())
    start = 0.1 if parameter.ndim < 2 else 0.5 / (parameter.numel() / parameter.shape[0]) ** 0.5
    return own or start
