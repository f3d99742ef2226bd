"""A plan in which no pair of layers costs more than the single layer."""

from __future__ import annotations

import numpy as np

from secateur.plan import Plan
from secateur.targets.lowrank.graph import RankGraph


def without_losses(graph: RankGraph, plan: Plan) -> Plan:
    """Put all directions of a layer back wherever that costs less.

    A pair is cheaper than the single layer below some rank, which depends on the numbers of inputs and
    outputs. If units are removed too, these numbers are smaller, and a rank that saved something before may
    save nothing any more. Then the layer stays a single layer: cheaper, and without an error.

    Args:
        graph: The trace.
        plan: The plan of a rule.

    Returns:
        The plan itself, if every pair saves something.
    """
    keep = {group.name: group.keep for group in plan.groups if group.removed}
    cost = graph.cost(keep)
    back = []
    for name in [name for name in keep if name in graph.uncorrelated]:
        fewer = {other: mask for other, mask in keep.items() if other != name}
        found = graph.cost(fewer)
        if found.params <= cost.params and found.macs <= cost.macs:
            keep, cost = fewer, found
            back.append(name)
    if not back:
        return plan
    made = Plan.build(
        graph,
        {name: np.asarray(mask) for name, mask in keep.items()},
        allocator=plan.allocator,
        settings=plan.settings,
        seed=plan.seed,
        budget=plan.budget,
        certificates=plan.certificates,
    )
    return made.on(plan.curve)
