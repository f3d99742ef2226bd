"""A plan in which no pair of layers costs more than the one layer would."""

from __future__ import annotations

import numpy as np

from secateur.plan import Plan
from secateur.targets.lowrank.graph import RankGraph


def without_losses(graph: RankGraph, plan: Plan) -> Plan:
    """Put all directions of a layer back wherever that costs less.

    A pair saves something from a rank on that depends on the layer's inputs and outputs. Where units go too,
    these get fewer, and a rank that saved something before may not do so any more. Then the layer stays one
    layer: cheaper, and without an error.

    Args:
        graph: The trace.
        plan: A rule's plan.

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
