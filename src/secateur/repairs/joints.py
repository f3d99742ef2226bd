"""Bypass residual blocks in a captured program: find the stream before and after each block."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from secateur.errors import ApplyError
from secateur.graph.nodes import hint
from secateur.stream.calls import ProgramCalls
from secateur.targets.blocks.residual import WEIGHS
from secateur.targets.units.module_form.sizes import running_modules


def joints(program: ProgramCalls, paths: Iterable[str]) -> dict[fx.Node, fx.Node]:
    """Find the node that replaces a block's output: the stream that the block reads.

    Args:
        program: The dense program.
        paths: Paths of the bypassed blocks.

    Returns:
        The node with the stream after each block -> the node with the stream before it.

    Raises:
        ApplyError: The program does not show the stream of a block.
    """
    found = {}
    for path in paths:
        inside = [node for node in program.nodes if path in running_modules(node)]
        own = {*inside}
        for node in reversed(inside):
            if all(user in own for user in node.users) or not _is_float(node):
                continue
            before = _before(node, own, program)
            if len(before) == 1:
                found[node] = before.pop()
                break
        else:
            raise ApplyError(
                f"repair: expected the captured program to have a stream through {path}, got none. Use a "
                "repair that needs no captured program: batchnorm."
            )
    return found


def _before(node: fx.Node, inside: set[fx.Node], program: ProgramCalls) -> set[fx.Node]:
    """Return nodes outside a block that reach one of its nodes without a layer in between."""
    seen, pending, found = {node}, [node], set()
    while pending:
        current = pending.pop()
        if current not in inside:
            if current not in program.names and _is_float(current) and _shape(current) == _shape(node):
                found.add(current)
        elif not WEIGHS.search(str(current.target)):
            pending += [n for n in current.all_input_nodes if n not in seen]
            seen.update(current.all_input_nodes)
    return found


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


def _shape(node: fx.Node) -> tuple[Any, ...]:
    value = node.meta["val"]
    return value.dtype, *map(hint, value.shape)


def idle_nodes(program: ProgramCalls, joined: Mapping[fx.Node, fx.Node]) -> set[fx.Node]:
    """Return the nodes that nothing reads any more once blocks are bypassed."""
    idle: set[fx.Node] = set()
    stay = {*joined, *joined.values()}
    for node in reversed(program.nodes):
        read = [user for user in node.users if user not in joined and user not in idle]
        if node.users and not read and node.name not in program.writes and node not in stay:
            idle.add(node)
    return idle


CLONE = torch.ops.aten.clone.default
"""The operator that replaces a block: it copies the stream, because later nodes may write into it."""
