"""Regions that capture keeps as nested programs (`torch.no_grad()`, disabled autocast) put back in line."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

_GRAD = "wrap_with_set_grad_enabled"
_AUTOCAST = "wrap_with_autocast"


def inline_regions(program: ExportedProgram) -> None:
    """Replace regions whose mode changes no value by their operators, in place.

    The results of a `no_grad` region are detached, which keeps gradients what they were. A region of
    *enabled* autocast changes values, so it stays nested.
    """
    graph = program.graph_module.graph
    inlined = 0
    while (found := _first_region(program)) is not None:  # regions may lie inside regions
        _inline(graph, *found)
        inlined += 1
    if not inlined:
        return
    for node in list(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    program.graph_module.recompile()


def _first_region(program: ExportedProgram) -> tuple[fx.Node, fx.GraphModule, tuple[Any, ...], bool] | None:
    for node in program.graph_module.graph.nodes:
        found = _region(program.graph_module, node)
        if found is not None:
            return node, *found
    return None


def _region(root: torch.nn.Module, node: fx.Node) -> tuple[fx.GraphModule, tuple[Any, ...], bool] | None:
    """The nested program of a node, its operands, and whether its results are to be detached."""
    name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
    if name == _GRAD:
        enabled, region, *operands = node.args
    elif name == _AUTOCAST:
        _, _, enabled, _, region, *operands = node.args
        if enabled:
            return None
    else:
        return None
    if not isinstance(region, fx.Node) or not isinstance(region.target, str):
        return None
    inner = root.get_submodule(region.target)
    return (
        (inner, tuple(operands), name == _GRAD and not enabled) if isinstance(inner, fx.GraphModule) else None
    )


def _inline(
    graph: fx.Graph, node: fx.Node, inner: fx.GraphModule, operands: tuple[Any, ...], detach: bool
) -> None:
    made: dict[fx.Node, Any] = {}
    parameters = iter(operands)
    results: Any = ()
    with graph.inserting_before(node):
        for source in inner.graph.nodes:
            if source.op == "placeholder":
                made[source] = next(parameters)
            elif source.op == "output":
                results = fx.node.map_arg(source.args[0], made.__getitem__)
            else:
                made[source] = graph.node_copy(source, made.__getitem__)
                if source.op == "get_attr":
                    holder = node.graph.owning_module
                    setattr(holder, source.target, getattr(inner, source.target))
        if detach:
            results = fx.node.map_arg(results, lambda result: _detached(graph, result))
    if isinstance(results, list | tuple):
        for user in list(node.users):
            if user.target is operator.getitem:
                number: Any = user.args[1]
                user.replace_all_uses_with(results[number])
                graph.erase_node(user)
    else:
        node.replace_all_uses_with(results)
    graph.erase_node(node)


def _detached(graph: fx.Graph, result: fx.Node) -> fx.Node:
    if not isinstance(result.meta.get("val"), torch.Tensor):
        return result
    new = graph.call_function(torch.ops.aten.detach.default, (result,))
    new.meta = dict(result.meta)
    return new
