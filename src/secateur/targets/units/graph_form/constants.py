"""The arguments of a program's calls after a plan: which change, and to what."""

from __future__ import annotations

from typing import Any

from torch import fx
from torch.utils import _pytree as pytree

from secateur.graph.binding import given_by_name
from secateur.graph.kept import Kept, Mask
from secateur.graph.rules import operator_name
from secateur.targets.units.graph_form.rewrites import REWRITES, Call, Rewrite


def rewrite_of(node: fx.Node) -> Rewrite | None:
    """Return the function that changes an operator's arguments; None if they contain no sizes."""
    return REWRITES.get(operator_name(node).removeprefix("aten."))


class Constants:
    """Which positions of a program's tensors stay, and how the arguments of its calls change."""

    def __init__(self, kept: Kept) -> None:
        self._kept = kept

    def kept(self, node: fx.Node) -> list[Mask]:
        """Return which positions of each axis of a tensor stay."""
        return self._kept.at(node)

    def follow(self, node: fx.Node) -> Call | None:
        """Return a call with its new arguments; None if it stays as it is."""
        rewrite = rewrite_of(node)
        if rewrite is None or not self._is_affected(node):
            return None
        target: Any = node.target
        given = given_by_name(target, node.args, node.kwargs)
        call = Call(node, target, given, self.kept, self.kept(node), self._kept.constant)
        rewrite(call)
        return call

    def _is_affected(self, node: fx.Node) -> bool:
        masks = pytree.tree_leaves([self.kept(n) for n in (node, *node.all_input_nodes)])
        return any(not mask.all() for mask in masks)
