"""A small network, and data for it, on which rules compete."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Net(nn.Module):
    """A residual block between convolutions, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 3, padding=1)
        self.inner, self.norm = nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.outer = nn.Conv2d(12, 8, 3, padding=1)
        self.last, self.head = nn.Conv2d(8, 10, 3), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = x + self.outer(torch.relu(self.norm(self.inner(x))))
        return self.head(torch.relu(self.last(x)).mean((2, 3)))


def data(labels: bool = True, batches: int = 10) -> list[Any]:
    rng = torch.Generator().manual_seed(1)
    images = [torch.randn(16, 2, 6, 6, generator=rng) for _ in range(batches)]
    return [(x, torch.arange(16) % 3) if labels else (x,) for x in images]
