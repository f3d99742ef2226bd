"""A clock that moves only when a model says so: measurements without time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur.measure.latency import timing


class Clock:
    """Stands in for the `time` module of what measures."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Timed(nn.Module):
    """A network whose forward pass takes as long as it is told: `fixed` and `each` a sample, in seconds."""

    def __init__(self, clock: Clock, fixed: float, each: float) -> None:
        super().__init__()
        self.clock, self.fixed, self.each = clock, fixed, each
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        self.clock.now += self.fixed + self.each * len(x)
        return self.layer(x)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock that everything here is measured with."""
    stopped = Clock()
    monkeypatch.setattr(timing, "time", stopped)
    torch.set_num_threads(1)
    return stopped
