"""Small calibration sets."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.helpers.models import CLASSES, TOPOLOGIES


def labelled(
    name: str, sizes: tuple[int, ...] = (7, 9, 4), dtype: torch.dtype = torch.float64, seed: int = 0
) -> list[tuple[Tensor, Tensor]]:
    """Batches of a topology's (single) input, with classes of unequal size that the inputs depend on."""
    total = sum(sizes)
    (inputs,) = TOPOLOGIES[name].inputs(total, dtype, seed)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (total,), generator=generator)
    labels[:3] = torch.tensor([0, 1, 0])  # at least two classes, whatever was drawn
    if inputs.is_floating_point():
        inputs = inputs + labels.to(dtype).reshape(-1, *[1] * (inputs.ndim - 1)) * 0.3
    return list(zip(inputs.split(sizes), labels.split(sizes), strict=True))
