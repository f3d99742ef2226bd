"""A network, its data and a loop, for tests of pruning while training."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import secateur as sc
from secateur.integrations import GradualPruner, Schedule

Batches = list[tuple[Tensor, Tensor]]


def network() -> nn.Sequential:
    """Convolutions with a batch norm, and a hidden layer; 24 hidden units in all."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 16),
        nn.ReLU(),
        nn.Linear(16, 3),
    )


def batches(count: int = 4, size: int = 12, seed: int = 0) -> Batches:
    """Images whose class shifts their mean. [size, 2, 6, 6] and [size] each"""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(size) % 3
    return [
        (torch.randn(size, 2, 6, 6, generator=generator) + labels[:, None, None, None] / 2, labels)
        for _ in range(count)
    ]


def a_pruner(
    rounds: int = 2, end: int = 4, macs: float = 0.5, repair: str | None = None, allocator: str = "uniform"
) -> GradualPruner:
    return GradualPruner(
        Schedule(sc.Budget(macs=macs), start=0, end=end, rounds=rounds), batches(), allocator, repair=repair
    )


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor]) -> float:
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def macs(model: nn.Module) -> int:
    return sc.trace(model, batches()[0][0]).cost().macs
