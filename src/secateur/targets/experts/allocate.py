"""What routers need of a rule: experts enough for every token, and equally many in each routing group."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from secateur.allocators.limits import Limits
from secateur.allocators.signals import ScoreTable, vector
from secateur.allocators.step_function import StepFunction
from secateur.errors import PlanError
from secateur.graph.graph import Graph
from secateur.graph.groups import Group
from secateur.plan import Plan
from secateur.targets.experts.blocks import Block
from secateur.targets.experts.equal import OtherRule

if TYPE_CHECKING:
    from secateur.targets.experts.graph import ExpertGraph


def within(blocks: Iterable[Block], limits: Limits) -> Limits:
    """The limits, tightened to what all routers need.

    One set holds for all blocks: that of the block that needs most.
    """
    blocks = tuple(blocks)
    groups = math.lcm(limits.multiple, *(block.routing_groups for block in blocks))
    fewest = max(block.min_keep for block in blocks)
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
                f"uses {block.top_k}{_of_groups(block)}, got {group.kept}. Remove fewer."
            )
        per_group = group.keep.reshape(block.routing_groups, -1).sum(axis=1)
        if len(set(per_group.tolist())) > 1:
            raise PlanError(
                f"experts {block.name}: expected equally many experts kept in each of its "
                f"{block.routing_groups} routing groups, got {per_group.tolist()}. Let a "
                "rule decide on sc.trace(..., granularity='expert')."
            )


def _of_groups(block: Block) -> str:
    groups = block.routing_groups
    return "" if groups == 1 else f" from {block.top_groups} of {groups} routing groups"


@dataclass(frozen=True)
class Grouped(OtherRule):
    """A rule that decides in each routing group on its own, and takes equally many from each of a block."""

    experts: ExpertGraph

    def steps(self, graph: Graph, scores: ScoreTable, limits: Limits) -> Mapping[str, StepFunction]:
        """The rule's step functions of all routing groups, put together for each block."""
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
