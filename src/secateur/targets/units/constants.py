"""The program's constant arguments after a plan: which change, to what, and which stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from secateur.graph.graph import Graph
from secateur.graph.labels import Labels
from secateur.graph.rules import operator_name
from secateur.graph.rules.op import Value, Walk
from secateur.plan import Plan
from secateur.targets.units.rewrites import REWRITES, Call, Mask, Rewrite

Kept = Callable[[Labels], Mask]
"""Which positions with these labels stay."""


def rewrite_of(node: fx.Node) -> Rewrite | None:
    """How the arguments of an operator follow; None if they hold no sizes."""
    return REWRITES.get(operator_name(node).removeprefix("aten."))


class Constants:
    """Which positions of each captured tensor stay, and how operators' arguments follow."""

    def __init__(self, walk: Walk, kept: Kept) -> None:
        self._walk = walk
        self._kept_along = kept
        self._masks: dict[fx.Node, list[Mask]] = {}

    @classmethod
    def of(cls, graph: Graph, plan: Plan) -> Constants:
        """Those of a whole model's program."""
        slots = graph.keep_slots(plan.keep)
        return cls(graph.walk, lambda labels: graph.kept_along(labels, slots))

    def kept(self, node: fx.Node) -> list[Mask]:
        """Which positions of each axis of a tensor stay."""
        if node not in self._masks:
            self._masks[node] = self._kept(self._walk.values[node])
        return self._masks[node]

    def follow(self, node: fx.Node) -> Call | None:
        """The call with its new arguments; None if it stays as it is."""
        rewrite = rewrite_of(node)
        if rewrite is None or not self._touched(node):
            return None
        target: Any = node.target
        names = (argument.name for argument in target._schema.arguments)
        before = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
        after = self._walk.values[node]
        masks: list[Any] = [self._kept(v) for v in after] if isinstance(after, list) else self._kept(after)
        call = Call(node, target, before, self.kept, masks, self._walk)
        rewrite(call)
        return call

    def _kept(self, value: Value) -> list[Mask]:
        return [self._kept_along(axis) for axis in value] if isinstance(value, tuple) else []

    def _touched(self, node: fx.Node) -> bool:
        values = [self._walk.values.get(n) for n in (node, *node.all_input_nodes)]
        flat = [v for value in values for v in (value if isinstance(value, list) else [value])]
        return any(not mask.all() for value in flat for mask in self._kept(value))
