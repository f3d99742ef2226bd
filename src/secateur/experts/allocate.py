"""Any rule for units decides on experts, within what routers can work with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from secateur.allocate.base import Allocator
from secateur.allocate.budget import Budget
from secateur.allocate.decision import Decision
from secateur.allocate.emp import EMP
from secateur.allocate.global_ranking import Global
from secateur.allocate.limits import Limits
from secateur.allocate.signals import ScoreTable, vector
from secateur.allocate.step_function import StepFunction
from secateur.allocate.tod import ToD
from secateur.allocate.uniform import Uniform
from secateur.errors import PlanError, SettingError
from secateur.experts.blocks import Block
from secateur.experts.equal import EqualCounts, OtherRule
from secateur.experts.graph import ExpertGraph
from secateur.graph.graph import Graph
from secateur.graph.groups import Group
from secateur.plan import Plan
from secateur.score.scores import Scores

DEFAULTS: Mapping[str, Allocator] = {
    "tod": ToD(removal="reap", protection="expert_taylor"),
    "emp": EMP(removal="reap"),
    "global": Global(removal="reap"),
    "uniform": Uniform(removal="reap"),
    "random": Uniform(removal="random"),
}
"""What a rule's name stands for where experts are decided on: signals that experts have."""


def allocate_experts(
    graph: ExpertGraph,
    scores: Scores | ScoreTable,
    allocator: str | Allocator = "tod",
    budget: Budget | None = None,
    limits: Limits | None = None,
    seed: int = 0,
    *,
    uniform: bool = False,
) -> Plan:
    """Decides how many experts each block loses, and which.

    No block is left with fewer experts than its router needs, and where the router parts them into equal
    groups each group loses equally many: the first to go of each, by the rule's own order within it.

    Args:
        graph: From `trace_experts`.
        scores: From `score_experts`.
        allocator: A rule for units, such as ``ToD(removal="reap", protection="frequency")``, or a name.
        budget: ``Budget(experts=0.75)`` for a total of experts, so that rules are compared at the same
            number, or any other; None lets the rule decide.
        limits: What the rule may not overstep; None for the defaults.
        seed: Recorded in the plan.
        uniform: Whether all blocks have to keep equally many experts, which is what stock Transformers can
            load; the same as ``EqualCounts(allocator)``. Needs a budget.

    Raises:
        SettingError: The rule is none, or its knob is not set.
        UnreachableBudgetError: The budget would leave too few experts; it says what can be reached.
        ScoreError: The scores do not fit.
    """
    rule = rule_called(allocator)
    limits = within(graph, limits or Limits())
    grouped = any(block.routing_groups > 1 for block in graph.blocks)
    equal = uniform or isinstance(rule, EqualCounts)
    inner = rule.rule if isinstance(rule, EqualCounts) else rule
    chosen: Allocator = _Grouped(inner, graph) if grouped else inner
    if equal:
        chosen = EqualCounts(chosen)
        budget = None if budget is None else replace(budget, spend=False)
    plan = chosen.allocate(cast(Graph, graph), scores, budget, limits, seed)
    check_kept(graph, plan)
    return plan


def rule_called(allocator: str | Allocator) -> Allocator:
    """The rule of this name with signals for experts, or the one that was passed.

    Raises:
        SettingError: There is none of that name, or it is no allocator.
    """
    if isinstance(allocator, str) and allocator in DEFAULTS:
        return DEFAULTS[allocator]
    if isinstance(allocator, Allocator):
        return allocator
    raise SettingError(
        f"allocator: expected one of {', '.join(DEFAULTS)} or an Allocator, got {allocator!r}. Write "
        'ToD(removal="reap", protection="frequency"), for example.'
    )


def within(graph: ExpertGraph, limits: Limits) -> Limits:
    """The limits, tightened to what all routers need.

    One set holds for all blocks: that of the block that needs most.
    """
    groups = math.lcm(limits.round_to, *(block.routing_groups for block in graph.blocks))
    fewest = max(block.min_keep for block in graph.blocks)
    return replace(limits, round_to=groups, min_keep=max(limits.min_keep, fewest))


def check_kept(graph: ExpertGraph, plan: Plan) -> None:
    """Make sure that every router can work with what a plan leaves.

    Raises:
        PlanError: A block keeps too few experts, or unequally many in its routing groups.
    """
    for group in plan.groups:
        block = graph.block(group.name)
        if group.removed and group.kept < block.min_keep:
            raise PlanError(
                f"experts {block.name}: expected at least {block.min_keep} experts kept, because a token "
                "uses "
                f"{block.top_k}{_of_groups(block)}, got {group.kept}. Remove fewer."
            )
        per_group = group.keep.reshape(block.routing_groups, -1).sum(axis=1)
        if len(set(per_group.tolist())) > 1:
            raise PlanError(
                f"experts {block.name}: expected equally many experts kept in each of its "
                f"{block.routing_groups} routing groups, got {per_group.tolist()}. Plan with "
                "allocate_experts."
            )


def _of_groups(block: Block) -> str:
    groups = block.routing_groups
    return "" if groups == 1 else f" from {block.top_groups} of {groups} routing groups"


@dataclass(frozen=True)
class _Grouped(OtherRule):
    """A rule that decides in each routing group on its own, and takes equally many from each of a block."""

    experts: ExpertGraph

    def steps(self, graph: Graph, scores: ScoreTable, limits: Limits) -> Mapping[str, StepFunction]:
        parts = {g.name: _parts(self.experts.block(g.name), g) for g in limits.considered(graph.groups)}
        table: dict[str, dict[str, NDArray[np.float64]]] = {
            signal: {
                part.name: values[start : start + part.size]
                for group in limits.considered(graph.groups)
                for values in [vector(scores, signal, group)]
                for start, part in parts[group.name]
            }
            for signal in scores
        }
        inner: Any = replace(self.experts, groups=tuple(part for some in parts.values() for _, part in some))
        # Here every count may be asked for: the block's own limits hold for the sum.
        found = self.rule.steps(inner, table, Limits(max_ratio=limits.max_ratio))
        return {
            name: _together([(start, found[part.name]) for start, part in some if part.name in found])
            for name, some in parts.items()
        }

    def certificates(
        self, graph: Graph, scores: ScoreTable, limits: Limits, decision: Decision
    ) -> dict[str, JsonValue]:
        return {}


def _parts(block: Block, group: Group) -> list[tuple[int, Group]]:
    """The routing groups of a block as groups of units, each with its first expert."""
    size = block.count // block.routing_groups
    return [
        (start, replace(group, name=f"{group.name}#{number}", size=size, slices=()))
        for number, start in enumerate(range(0, block.count, size))
    ]


def _together(parts: list[tuple[int, StepFunction]]) -> StepFunction:
    """One step function for a block, which takes the next expert of each part in turn."""
    order = np.stack([start + function.order for start, function in parts], axis=1).ravel()
    knob = np.unique(np.concatenate([function.knob for _, function in parts]))
    total = np.array([sum(function.removed(k) for _, function in parts) for k in knob], dtype=np.int64)
    return StepFunction(order=order, knob=knob, count=total // len(parts) * len(parts))
