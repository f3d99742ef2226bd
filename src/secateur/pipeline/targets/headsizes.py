"""The targets ``head_size`` and ``unit+head_size``: dimensions of attention heads, alone or with units."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

from torch import nn

from secateur.allocators import Budget
from secateur.graph.graph import Graph
from secateur.pipeline.result import clock
from secateur.pipeline.targets.target import Task
from secateur.pipeline.targets.units import Units
from secateur.plan import Plan
from secateur.signals import Scores
from secateur.signals.distributed import team_of_processes
from secateur.targets.headsizes import together, trace
from secateur.targets.headsizes.align import align_heads
from secateur.targets.units.record import with_note


class HeadSizes(Units):
    """Removes dimensions of attention heads: those of queries with keys, and those of values.

    First the heads get another basis, in which their last dimensions matter least (`align_heads`). The model
    in this basis takes the place of the dense model: it gives the same outputs.
    """

    budgets: ClassVar[tuple[Budget, ...]] = (Budget(params=0.95), Budget(params=0.9))
    traced: ClassVar[Callable[..., Graph]] = staticmethod(trace.trace)

    def __init__(self, task: Task, graph: Graph | None = None) -> None:
        """Trace the model and align its heads, unless a graph is given."""
        super().__init__(task, graph)
        self._aligned = 0
        if graph is None:
            with clock(task.seconds, "align"), team_of_processes(self.graph.device) as team:
                if team.size == 1:  # the processes of a team see different data
                    model, self._aligned = align_heads(
                        task.model, self.graph, task.fit, progress=task.progress
                    )
            if self._aligned:
                self.task = replace(task, model=model)
                self.graph = self.trace(model)

    def plan_and_apply(self, rule: Any, scores: Scores, budget: Budget | None) -> tuple[nn.Module, Plan]:
        """Plan and apply, as for units. The note says how many attention layers got another basis."""
        small, plan = super().plan_and_apply(rule, scores, budget)
        if self._aligned:
            note = f"Heads have another basis in {self._aligned} products of queries, keys and values."
            small = with_note(small, note)
        return small, plan


class UnitsAndHeadSizes(HeadSizes):
    """Removes dimensions of attention heads, and channels, neurons and hidden units, but no whole heads."""

    traced: ClassVar[Callable[..., Graph]] = staticmethod(together.trace)
