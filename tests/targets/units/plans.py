"""Plans for tests: any choice of units, not only those that an allocator likes."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from secateur import Graph, Plan

Keep = dict[str, NDArray[np.bool_]]


@st.composite
def keeps(draw: st.DrawFn, graph: Graph) -> Keep:
    """Masks for any subset of the groups, at least one unit kept in each. [group.size] each"""
    found: Keep = {}
    for group in graph.groups:
        mask = draw(st.lists(st.booleans(), min_size=group.size, max_size=group.size) | st.none())
        if mask is not None:
            mask[draw(st.integers(0, group.size - 1))] = True
            found[group.name] = np.array(mask)
    return found


def plan_of(graph: Graph, keep: Keep) -> Plan:
    """A plan that keeps what `keep` says."""
    return Plan.build(graph, keep, allocator="test")


def random_plan(graph: Graph, ratio: float = 0.4, seed: int = 0) -> Plan:
    """A plan that removes the floor of `ratio` of each group's units, at least one, chosen at random."""
    rng = np.random.default_rng(seed)
    keep: Keep = {}
    for group in graph.groups:
        keep[group.name] = np.ones(group.size, dtype=bool)
        gone = max(int(ratio * group.size), 1)
        keep[group.name][rng.permutation(group.size)[:gone]] = False
    return plan_of(graph, keep)
