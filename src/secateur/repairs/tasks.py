"""What a sweep has to do: the weights to refit, in order, and which of them read the same input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from secateur.graph.datasizes import depends_on_data
from secateur.repairs.pairs import Pair
from secateur.repairs.regression.additions import Addition, addition_after
from secateur.repairs.regression.layers import Site


@dataclass(frozen=True)
class Task:
    """A weight to refit, with all layer calls that use it.

    Attributes:
        sites: The calls, in order of execution.
        sums: For each call the addition that reads its output and whose result should be right, or None.
        bias: The bias that is refitted too, or None.
        norm: For a layer without bias: the running mean of the batch norm that takes the bias, or None.
    """

    sites: tuple[Site, ...]
    sums: tuple[Addition | None, ...]
    bias: fx.Node | None
    norm: fx.Node | None

    @property
    def weight(self) -> fx.Node:
        """The weight's placeholder."""
        return self.sites[0].weight


def tasks_of(pair: Pair) -> list[Task]:
    """Return a task for every weight that only layer calls read, in order of execution."""
    by_weight: dict[fx.Node, list[Site]] = {}
    for node in pair.nodes:
        if node in pair.idle:
            continue
        site = Site.of(node, pair.planned[node], pair)
        if site is not None:
            by_weight.setdefault(pair.same(site.weight)[0], []).append(site)
    found = []
    for sites in by_weight.values():
        nodes = {site.node for site in sites}
        # Several calls are run ahead on a fork of the values, which shares their tensors. Operators that
        # write in place would then change the original values too, so such weights are skipped.
        if not pair.readers(sites[0].weight) <= nodes or (len(sites) > 1 and pair.writes):
            continue
        # The pruned model may send other tokens to an expert than the dense one: rows would not match.
        if any(depends_on_data(size) for node in nodes for size in node.meta["val"].shape):
            continue
        biases = {site.bias for site in sites}
        bias = next(iter(biases)) if len(biases) == 1 else None
        if bias is not None and not pair.readers(bias) <= nodes:
            bias = None
        norm = _norm_after(sites[0].node, pair) if biases == {None} and len(sites) == 1 else None
        found.append(Task(tuple(sites), tuple(addition_after(s, pair) for s in sites), bias, norm))
    return found


def _norm_after(node: fx.Node, pair: Pair) -> fx.Node | None:
    """Return the running mean of the batch norm behind a node, if it can take a bias; else None.

    The batch norm must be the node's only reader, and no other node may read the running mean.
    """
    users = list(node.users)
    if len(users) != 1 or str(users[0].target) != "aten.batch_norm.default" or users[0].args[5] is not False:
        return None
    mean: Any = users[0].args[3]
    return mean if pair.is_tensor(mean) and pair.readers(mean) == {users[0]} else None


def siblings_among(found: Sequence[Task], pair: Pair) -> list[list[Task]]:
    """Collect tasks whose layers read the same columns: such as queries, keys and values.

    Their regressions have the same sums of columns with columns, which then are computed once, where the
    first of them runs. So a task whose target needs a value that is computed later stays alone.
    """
    collected: dict[Any, list[Task]] = {}
    for task in found:
        key: Any = task
        if len(task.sites) == 1:
            first = task.sites[0]
            reads = first.reads(pair.planned[first.node], pair.tensor(first.weight))
            known = collected.get(reads, [task])[0]
            key = reads if is_ready(task, pair, start_of(known, pair)) else task
        collected.setdefault(key, []).append(task)
    return list(collected.values())


def is_ready(task: Task, pair: Pair, position: int) -> bool:
    """Whether the targets of a task can be computed at a position, at or before its first call."""
    others = (addition.other for addition in task.sums if addition is not None)
    return all(pair.index.get(other, -1) < position for other in others)


def start_of(task: Task, pair: Pair) -> int:
    """Return the position of a task's first call."""
    return min(pair.index[site.node] for site in task.sites)
