"""Which pruned groups a smaller module cannot express."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

from secateur.errors import ApplyError
from secateur.graph.graph import Graph
from secateur.plan import Plan
from secateur.targets.units.graph_form.traced import Traced
from secateur.targets.units.module_form.realise import proven_module, without_numbers

MANY = 4
"""If more layers than this are equal, only the first and the last are tried."""


def unrealisable(
    traced: Traced, plan: Plan, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[str, ...]:
    """Find the pruned groups that a smaller module cannot express, by halving the set of groups.

    Groups whose names differ only in numbers, as those of equal layers do, are tried together first. If many
    of them fail together, and both the first and the last fail alone, all count as failing. Each trial runs
    the whole model, so this saves much time.
    """
    by_kind: dict[str, list[str]] = {}
    for group in plan.groups:
        if group.removed:
            by_kind.setdefault(without_numbers(group.name), []).append(group.name)

    def works(names: list[str]) -> bool:
        try:
            less = restricted(plan, traced.graph, names)
            proven_module(traced, less, args, kwargs, only_proof=True)
        except ApplyError:
            return False
        return True

    failed: list[str] = []
    for kind in _failing(list(by_kind), lambda kinds: works([n for k in kinds for n in by_kind[k]])):
        names = by_kind[kind]
        all_fail = len(names) > MANY and not works(names[:1]) and not works(names[-1:])
        failed += names if all_fail else _failing(names, works)
    pruned = [g.name for g in plan.groups if g.removed]
    left = [name for name in pruned if name not in failed]
    return tuple(name for name in pruned if name in failed) if works(left) else tuple(pruned)


def restricted(plan: Plan, graph: Graph, names: list[str]) -> Plan:
    """Make a plan that prunes only these groups, as the given plan does."""
    return Plan.build(
        graph,
        {g.name: g.keep for g in plan.groups if g.name in names},
        allocator=plan.allocator,
        settings=plan.settings,
        seed=plan.seed,
        budget=plan.budget,
        certificates=plan.certificates,
    )


def _failing(names: list[str], works: Callable[[list[str]], bool]) -> list[str]:
    """Return the members that have to be left out so that `works` is true. Sets are halved to find them."""
    if not names or works(names):
        return []
    if len(names) == 1:
        return names
    parts = 2 if len(names) > 4 else len(names)
    cuts = [len(names) * k // parts for k in range(parts + 1)]
    failed = [n for a, b in itertools.pairwise(cuts) for n in _failing(names[a:b], works)]
    left = [name for name in names if name not in failed]
    # Two halves may work alone and fail together.
    return failed if works(left) else failed + left
