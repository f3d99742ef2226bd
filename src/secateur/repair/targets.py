"""What a layer of the pruned program should give.

The dense program's output, as a rule. Where that goes into an addition whose other operand is there
already, what the sum should be is known, and so is what the pruned program will add: the difference is
the target. So each addition of a residual stream corrects what went wrong in the stream before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from secateur.repair.layers import Site
from secateur.repair.twin import Twin, Values

_FAINT = 1e-3
"""Channels whose factor on the way to the addition is smaller than this, relative to the largest, keep
their plain target: to correct a sum through them would take huge weights."""

_SCALES = ("aten.mul.Tensor", "aten.mul_.Tensor", "aten.div.Tensor", "aten.div_.Tensor")
_SUMS = ("aten.add.Tensor", "aten.add_.Tensor")
_DROPOUTS = ("aten.dropout.default", "aten.dropout_.default", "aten.feature_dropout.default")
_SAME = ("aten.clone.default", "aten.contiguous.default", "aten.alias.default", "aten.detach.default")


@dataclass(frozen=True)
class Sum:
    """An addition that a layer's output reaches through nothing but factors and shifts of each channel.

    Attributes:
        chain: The nodes on the way, in order, without the addition.
        other: What is added there.
    """

    chain: tuple[fx.Node, ...]
    other: fx.Node


def sum_after(site: Site, twin: Twin) -> Sum | None:
    """The addition behind a layer, if its other operand is computed before the layer."""
    chain: list[fx.Node] = []
    node = site.node
    while len(node.users) == 1:
        (user,) = node.users
        other = _added(node, user, twin)
        if other is not None:
            ready = other in twin.index and twin.index[other] < twin.index[site.node]
            return Sum(tuple(chain), other) if ready and not _overwritten(other, site, user, twin) else None
        if not _is_affine(node, user, twin):
            return None
        chain.append(user)
        node = user
    return None


def _added(node: fx.Node, user: fx.Node, twin: Twin) -> fx.Node | None:
    """The other operand, if `user` adds one of the same shape to `node`."""
    if str(user.target) not in _SUMS or user.kwargs.get("alpha", 1) != 1:
        return None
    others = [a for a in user.args[:2] if a is not node]
    if len(others) != 1 or not isinstance(others[0], fx.Node) or others[0] in twin.names:
        return None
    shapes = [n.meta["val"].shape for n in (others[0], node, user)]
    return others[0] if shapes[0] == shapes[1] == shapes[2] else None


def _is_affine(node: fx.Node, user: fx.Node, twin: Twin) -> bool:
    """Whether `user` multiplies and shifts each position of `node` by constants of the model."""
    name = str(user.target)
    rest: list[Any] = [a for a in user.all_input_nodes if a is not node]
    if any(not twin.is_tensor(a) for a in rest) or (user.args[0] is not node and name not in _SCALES + _SUMS):
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


def _overwritten(other: fx.Node, site: Site, addition: fx.Node, twin: Twin) -> bool:
    """Whether something between a layer and the addition writes into the other operand."""
    if other.name not in twin.writes:
        return False
    between = twin.nodes[twin.index[site.node] : twin.index[addition]]
    return any(other in node.all_input_nodes for node in between)


@torch.no_grad()
def target(site: Site, addition: Sum | None, twin: Twin, values: Values) -> Tensor:
    """What the layer should give for one batch, at the kept positions, in the shape of its output."""
    wanted: Tensor = twin.dense_value(site.node, values)
    if addition is None:
        return wanted
    zero = torch.zeros_like(wanted[:1])
    shift = twin.run_chain(addition.chain, site.node, zero, dense=False)
    factor = twin.run_chain(addition.chain, site.node, zero + 1, dense=False) - shift
    drift = twin.dense_value(addition.other, values) - twin.small_value(addition.other, values)
    if addition.chain:
        into = twin.run_chain(addition.chain, site.node, wanted, dense=True)
        corrected = (into + drift - shift) / factor
    else:
        corrected = wanted + drift
    return torch.where(factor.abs() > _FAINT * factor.abs().max(), corrected, wanted)
