"""A rule that leaves residual streams as wide as they are."""

from __future__ import annotations

from dataclasses import dataclass, replace

from secateur.allocate import Budget, Limits
from secateur.allocate.registry import Allocates
from secateur.allocate.signals import ScoreTable
from secateur.graph.graph import Graph
from secateur.plan import Plan
from secateur.regression.additions import addition_after
from secateur.regression.readers import LayerCalls
from secateur.score.combination import Asked
from secateur.score.scores import Scores


@dataclass(frozen=True)
class StreamsWhole:
    """Another rule, for the groups that are no residual streams.

    Attributes:
        rule: The rule.
    """

    rule: Allocates

    @property
    def signals(self) -> tuple[Asked, ...]:
        """Those of the rule."""
        return self.rule.signals

    def allocate(
        self,
        graph: Graph,
        scores: Scores | ScoreTable,
        budget: Budget | None = None,
        limits: Limits | None = None,
        seed: int = 0,
    ) -> Plan:
        """What the rule decides, with streams left alone."""
        limits = limits or Limits()
        ignore = (*limits.ignore, *streams(graph))
        return self.rule.allocate(graph, scores, budget, replace(limits, ignore=ignore), seed)


def streams(graph: Graph) -> tuple[str, ...]:
    """The groups that are sums: a layer that produces them is added to what was computed before it."""
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
