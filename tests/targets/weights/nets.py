"""Small networks and data for tests of masks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import secateur as sc
from secateur.allocators.registry import resolve
from secateur.targets.weights import Weights


class Net(nn.Module):
    """Every kind of layer whose weights are masked; strided, grouped and dilated convolutions among them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 12, (3, 1), groups=4, dilation=2, padding="same", bias=False)
        self.line = nn.Conv1d(12, 6, 2, padding=1, padding_mode="circular")
        self.fc = nn.Linear(6 * 17, 5)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 3, 8, 8] to [batch, 5]."""
        x = torch.relu(self.norm(self.conv(x)))
        x = torch.relu(self.grouped(x))
        return self.fc(torch.tanh(self.line(x.flatten(2))).flatten(1))


def net(seed: int = 0) -> Net:
    """In float64 and evaluation mode, with running statistics that are not those of a new one."""
    torch.manual_seed(seed)
    found = Net().double().eval()
    nn.init.uniform_(found.norm.running_mean, -0.2, 0.2)
    nn.init.uniform_(found.norm.running_var, 0.5, 1.5)
    return found


def data(batches: int = 3, samples: int = 6, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    """Images and labels."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(samples, 3, 8, 8, generator=generator, dtype=torch.float64),
            torch.randint(5, (samples,), generator=generator),
        )
        for _ in range(batches)
    ]


def prune(
    model: nn.Module, batches: Any, budget: Any, allocator: Any = None, repair: Any = "auto", **more: Any
) -> Any:
    """`sc.prune` for single weights."""
    return sc.prune(model, batches, budget, allocator, "weight", repair, **more)


def traced(model: nn.Module) -> Weights:
    """The weights that masks cover."""
    return sc.trace(model, granularity="weight")


def score(model: nn.Module, *args: Any, **options: Any) -> sc.Scores:
    """Of a model's single weights."""
    return sc.score(traced(model), *args, **options)


def allocate(weights: Weights, scores: sc.Scores, rule: Any, *args: Any, **options: Any) -> sc.MaskPlan:
    """Masks, by a rule or the name of one."""
    found: Any = resolve(rule)
    plan: sc.MaskPlan = found.allocate(weights, scores, *args, **options)
    return plan
