"""The program's constant arguments after a plan: which change, to what, and which stay."""

from __future__ import annotations

from typing import Any

from torch import fx
from torch.utils import _pytree as pytree

from secateur.graph.kept import Kept, Mask
from secateur.graph.rules import operator_name
from secateur.targets.units.rewrites import REWRITES, Call, Rewrite


def rewrite_of(node: fx.Node) -> Rewrite | None:
    """How the arguments of an operator follow; None if they hold no sizes."""
    return REWRITES.get(operator_name(node).removeprefix("aten."))


class Constants:
    """Which positions of each captured tensor stay, and how operators' arguments follow."""

    def __init__(self, kept: Kept) -> None:
        self._kept = kept

    def kept(self, node: fx.Node) -> list[Mask]:
        """Which positions of each axis of a tensor stay."""
        return self._kept.at(node)

    def follow(self, node: fx.Node) -> Call | None:
        """The call with its new arguments; None if it stays as it is."""
        rewrite = rewrite_of(node)
        if rewrite is None or not self._touched(node):
            return None
        target: Any = node.target
        names = (argument.name for argument in target._schema.arguments)
        given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
        call = Call(node, target, given, self.kept, self.kept(node), self._kept.constant)
        rewrite(call)
        return call

    def _touched(self, node: fx.Node) -> bool:
        masks = pytree.tree_leaves([self.kept(n) for n in (node, *node.all_input_nodes)])
        return any(not mask.all() for mask in masks)
