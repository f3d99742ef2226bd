"""An allocator that does not prune residual streams."""

from __future__ import annotations

from dataclasses import dataclass, replace

from secateur.allocators import Budget, Limits
from secateur.allocators.registry import Allocates
from secateur.allocators.signals import ScoreTable
from secateur.graph.graph import Graph
from secateur.plan import Plan
from secateur.repairs.regression.additions import addition_after
from secateur.repairs.regression.readers import LayerCalls
from secateur.signals.scores import Scores
from secateur.signals.units.combination import SignalLike


@dataclass(frozen=True)
class StreamsWhole:
    """Applies another allocator to all groups except residual streams, which keep their width.

    Attributes:
        rule: The other allocator.
    """

    rule: Allocates

    @property
    def signals(self) -> tuple[SignalLike, ...]:
        """The signals that the other allocator reads."""
        return self.rule.signals

    def allocate(
        self,
        graph: Graph,
        scores: Scores | ScoreTable,
        budget: Budget | None = None,
        limits: Limits | None = None,
        seed: int = 0,
    ) -> Plan:
        """Let the other allocator decide, with residual streams added to the groups to ignore."""
        limits = limits or Limits()
        ignore = (*limits.ignore, *streams(graph))
        return self.rule.allocate(graph, scores, budget, replace(limits, ignore=ignore), seed)


def streams(graph: Graph) -> tuple[str, ...]:
    """Find the groups that are residual streams: a layer's output is added to an earlier value.

    Returns:
        Names of the groups.
    """
    calls = LayerCalls(graph)
    return tuple(
        group.name
        for group in graph.groups
        if any(
            addition_after(site, calls.program_calls) is not None
            for piece in group.of_role("produce")
            for site in calls.of(piece)
        )
    )
