"""Form ``masked``: the dense model, with zeros in all weights that read removed units."""

from __future__ import annotations

import torch
from torch import nn

from secateur.plan import Plan
from secateur.targets.units.copying import duplicate
from secateur.targets.units.tensors import removed_positions, tensor_called


def masked(model: nn.Module, plan: Plan) -> nn.Module:
    """Copy the model and write zeros where layers read removed units. Other forms are compared with it.

    Raises:
        ApplyError: The model cannot be copied, or has not all tensors of the plan.
    """
    reference = duplicate(model)
    with torch.no_grad():
        for name, axes in removed_positions(plan, consumed_only=True).items():
            tensor = tensor_called(reference, name)
            for axis, positions in axes.items():
                tensor.index_fill_(axis, torch.as_tensor(positions, device=tensor.device), 0)
    return reference
