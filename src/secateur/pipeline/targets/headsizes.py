"""The targets ``head_size`` and ``unit+head_size``: dimensions of attention heads, alone or with units."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from secateur.allocators import Budget
from secateur.graph.graph import Graph
from secateur.pipeline.targets.units import Units
from secateur.targets.headsizes import together, trace


class HeadSizes(Units):
    """Removes dimensions of attention heads: those of queries with keys, and those of values."""

    budgets: ClassVar[tuple[Budget, ...]] = (Budget(params=0.95), Budget(params=0.9))

    def trace(self, model: nn.Module) -> Graph:
        """Trace a model."""
        return trace.trace(model, self.task.example.inputs, allow_inexact=self.task.allow_inexact)


class UnitsAndHeadSizes(Units):
    """Removes dimensions of attention heads, and channels, neurons and hidden units, but no whole heads."""

    def trace(self, model: nn.Module) -> Graph:
        """Trace a model."""
        return together.trace(model, self.task.example.inputs, allow_inexact=self.task.allow_inexact)
