"""The addition that a layer's output goes into, as on a residual stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from secateur.repairs.regression.layers import Site
from secateur.stream.calls import ProgramCalls

_SCALES = ("aten.mul.Tensor", "aten.mul_.Tensor", "aten.div.Tensor", "aten.div_.Tensor")
_SUMS = ("aten.add.Tensor", "aten.add_.Tensor")
_DROPOUTS = ("aten.dropout.default", "aten.dropout_.default", "aten.feature_dropout.default")
_SAME = ("aten.clone.default", "aten.contiguous.default", "aten.alias.default", "aten.detach.default")


@dataclass(frozen=True)
class Addition:
    """An addition that a layer's output reaches through nothing but factors and shifts of each channel.

    Attributes:
        chain: The nodes on the way, in order, without the addition.
        node: The addition.
        other: What is added there.
    """

    chain: tuple[fx.Node, ...]
    node: fx.Node
    other: fx.Node


def addition_after(site: Site, program_calls: ProgramCalls) -> Addition | None:
    """The addition behind a layer, if its other operand is computed before the layer."""
    chain: list[fx.Node] = []
    node = site.node
    while len(node.users) == 1:
        (user,) = node.users
        other = _added(node, user, program_calls)
        if other is not None:
            ready = (
                other in program_calls.index and program_calls.index[other] < program_calls.index[site.node]
            )
            return (
                Addition(tuple(chain), user, other)
                if ready and not _overwritten(other, site, user, program_calls)
                else None
            )
        if not _is_affine(node, user, program_calls):
            return None
        chain.append(user)
        node = user
    return None


def _added(node: fx.Node, user: fx.Node, program_calls: ProgramCalls) -> fx.Node | None:
    """The other operand, if `user` adds one of the same shape to `node`."""
    if str(user.target) not in _SUMS or user.kwargs.get("alpha", 1) != 1:
        return None
    others = [a for a in user.args[:2] if a is not node]
    if len(others) != 1 or not isinstance(others[0], fx.Node) or others[0] in program_calls.names:
        return None
    shapes = [n.meta["val"].shape for n in (others[0], node, user)]
    return others[0] if shapes[0] == shapes[1] == shapes[2] else None


def _is_affine(node: fx.Node, user: fx.Node, program_calls: ProgramCalls) -> bool:
    """Whether `user` multiplies and shifts each position of `node` by constants of the model."""
    name = str(user.target)
    rest: list[Any] = [a for a in user.all_input_nodes if a is not node]
    if any(not program_calls.is_tensor(a) for a in rest) or (
        user.args[0] is not node and name not in _SCALES + _SUMS
    ):
        return False
    before, after = node.meta["val"], user.meta["val"]
    if not isinstance(after, Tensor) or after.shape != before.shape or after.dtype != before.dtype:
        return False
    if name == "aten.batch_norm.default":
        return user.args[5] is False
    if name in _DROPOUTS:
        return user.args[2] is False
    if name in ("aten.div.Tensor", "aten.div_.Tensor"):
        return user.args[0] is node
    return name in _SCALES + _SUMS + _SAME


def _overwritten(other: fx.Node, site: Site, addition: fx.Node, program_calls: ProgramCalls) -> bool:
    """Whether something between a layer and the addition writes into the other operand."""
    if other.name not in program_calls.writes:
        return False
    between = program_calls.nodes[program_calls.index[site.node] : program_calls.index[addition]]
    return any(other in node.all_input_nodes for node in between)
