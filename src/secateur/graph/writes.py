"""Writes in place in a captured program, and operators that have no effect."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

READ = torch.ops.aten._assert_tensor_metadata.default
"""With nothing to check, it marks a tensor whose values Python code reads, to go one way or another."""


def is_read_by_code(node: fx.Node) -> bool:
    """Whether a call marks a tensor whose values Python code reads."""
    return node.target is READ and len(node.args) == 1 and not node.kwargs


def written(module: fx.GraphModule) -> frozenset[str]:
    """Return the names of nodes whose value some operator overwrites."""
    return frozenset(
        source.name
        for part in module.modules()
        if isinstance(part, fx.GraphModule)
        for node in part.graph.nodes
        for source in _overwrites(node)
    )


def written_through(graph: fx.Graph) -> frozenset[fx.Node]:
    """Return the nodes that some operator writes to, directly or through a view."""
    found: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        found.update(_overwrites(node))
        if node in found and (source := _viewed(node)) is not None:
            found.add(source)
    return frozenset(found)


def dead_nodes(graph: fx.Graph) -> frozenset[fx.Node]:
    """Return operator calls without effect.

    No output depends on them, the code reads none of their values, and they draw no random numbers.
    """
    memory: dict[fx.Node, fx.Node] = {}  # node -> the node whose memory its value shares
    writers: dict[fx.Node, list[fx.Node]] = {}
    pending = []
    for node in graph.nodes:
        source = _viewed(node)
        memory[node] = node if source is None else memory[source]
        for target in _overwrites(node):
            writers.setdefault(memory[target], []).append(node)
        if node.op == "output" or _has_effects(node):
            pending.append(node)
    for owner, nodes in writers.items():
        pending += nodes if owner.op == "placeholder" else []
    live: set[fx.Node] = set()
    while pending:
        node = pending.pop()
        if node not in live:
            live.add(node)
            pending += [*node.all_input_nodes, *writers.get(memory[node], ())]
    return frozenset(
        n
        for n in graph.nodes
        if n.op == "call_function"
        and n not in live
        and not (_asserts(n) and live.issuperset(n.all_input_nodes))
    )


def erase(module: fx.GraphModule, nodes: frozenset[fx.Node]) -> None:
    """Remove nodes from a program, in place. Nothing else may read them."""
    for node in reversed(module.graph.nodes):
        if node in nodes:
            module.graph.erase_node(node)
    module.recompile()


def _asserts(node: fx.Node) -> bool:
    """Whether a call only checks values. Checks of a dtype or device do not count: capture adds them."""
    named = str(node.target) == "aten._assert_tensor_metadata.default"
    return node.meta.get("val") is None and not node.users and not named


def _has_effects(node: fx.Node) -> bool:
    if node.op != "call_function" or node.target is operator.getitem:
        return False
    if not isinstance(node.target, torch._ops.OpOverload):
        return isinstance(node.target, torch._ops.HigherOrderOperator)
    if is_read_by_code(node):
        return True
    idle = "dropout" in node.target.__name__ and node.args[2:3] == (False,)
    return torch.Tag.nondeterministic_seeded in node.target.tags and not idle


def _arguments(node: fx.Node) -> Iterator[tuple[Any, Any]]:
    """Yield arguments that are overwritten or share memory with a result, with what is passed for them."""
    schema = getattr(node.target, "_schema", None)
    for position, argument in enumerate(schema.arguments if schema is not None else ()):
        if argument.alias_info is not None:
            yield (
                argument,
                node.args[position] if position < len(node.args) else node.kwargs.get(argument.name),
            )


def _overwrites(node: fx.Node) -> list[fx.Node]:
    found: list[fx.Node] = []
    for argument, value in _arguments(node):
        if argument.alias_info.is_write:
            fx.map_arg(value, found.append)
    return found


def _viewed(node: fx.Node) -> fx.Node | None:
    """Return the node whose memory this node's value shares; None if it has its own."""
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        return node.args[0]
    given = (value for _, value in _arguments(node) if isinstance(value, fx.Node))
    return next(given, None)
