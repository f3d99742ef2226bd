"""Form ``masked``: the dense model with the slices that consume removed units set to zero."""

from __future__ import annotations

import torch
from torch import nn

from secateur.plan import Plan
from secateur.targets.units.copying import duplicate
from secateur.targets.units.tensors import removed_positions, tensor_called


def masked(model: nn.Module, plan: Plan) -> nn.Module:
    """A copy of the model in which no layer reads the removed units; the reference for the other forms.

    Raises:
        ApplyError: If the model cannot be copied, or does not hold one of the plan's tensors.
    """
    reference = duplicate(model)
    with torch.no_grad():
        for name, axes in removed_positions(plan, consumed_only=True).items():
            tensor = tensor_called(reference, name)
            for axis, positions in axes.items():
                tensor.index_fill_(axis, torch.as_tensor(positions, device=tensor.device), 0)
    return reference
