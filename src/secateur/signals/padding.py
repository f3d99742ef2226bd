"""Which positions of a batch are no padding."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.calibration import Batch


def real_positions(batch: Batch, tokens: int, device: torch.device) -> Tensor:
    """Positions of the tokens that a batch's ``attention_mask`` does not call padding; all without one.

    Args:
        batch: The batch.
        tokens: How many tokens there are.
        device: Where the result will be.

    Returns:
        Their indices among all tokens, sample by sample. [tokens that are real]
    """
    mask = batch.kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.numel() == tokens:
        return torch.where(mask.reshape(-1) != 0)[0].to(device)
    return torch.arange(tokens, device=device)
