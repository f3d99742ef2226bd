"""Small networks with linear layers of every kind that can become two, and plans for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur import Plan
from secateur.targets.lowrank.graph import RankGraph
from tests.targets.units.plans import Keep, plan_of

WIDTH, INNER = 12, 24
MAPS = torch.randn(4, 3, 4, 6, generator=torch.Generator().manual_seed(1))


class Several(nn.Module):
    """A convolution with a kernel of 1 and a stride, and linear layers with and without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.wide = nn.Conv2d(8, WIDTH, 1, stride=(2, 3))
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, INNER)
        self.down = nn.Linear(INNER, WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.wide(torch.relu(self.stem(x))).flatten(2).transpose(1, 2)
        x = x + self.down(torch.relu(self.up(self.norm(x))))
        found: Tensor = self.head(x.mean(1))
        return found


LAYERS = ("wide", "up", "down", "head")
"""Those of `Several` that can become two."""


def several(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return Several().eval().to(dtype)


def batches(count: int = 3, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(6, 3, 4, 6, dtype=dtype, generator=generator) for _ in range(count)]


def rank_plan(graph: Any, ratio: float = 0.5, seed: int = 0) -> Plan:
    """A plan that removes about this fraction of each group at random.

    A third of the groups of directions stay whole. From the others the last unit goes too.
    """
    rng = np.random.default_rng(seed)
    keep: Keep = {}
    assert isinstance(graph, RankGraph)
    for number, group in enumerate(graph.groups):
        directions = group.name in graph.uncorrelated
        if directions and number % 3 == seed % 3:
            continue
        mask = np.ones(group.size, dtype=bool)
        mask[rng.permutation(group.size - directions)[: int(ratio * group.size)]] = False
        if directions:
            mask[-1] = False
        if not mask.any():
            mask[0] = True
        keep[group.name] = mask
    return plan_of(graph, keep)
