"""The network on which rules compete."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.pipeline.auto.residual import Net


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model.eval()
