"""Regions that capture keeps as nested programs (`torch.no_grad()`, autocast) put back in line."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from secateur.graph.rules.op import shape_of

_GRAD = "wrap_with_set_grad_enabled"
_AUTOCAST = "wrap_with_autocast"


def autocast_to(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What autocast does to an operand: it is cast unless it holds integers or doubles."""
    castable = tensor.is_floating_point() and tensor.dtype is not torch.float64
    return tensor.to(dtype) if castable else tensor


def inline_regions(program: ExportedProgram) -> None:
    """Replace regions by their operators, in place.

    The results of a `no_grad` region are detached, which keeps gradients what they were. In a region of
    autocast, `autocast_to` stands before each operator whose operands are cast there.
    """
    _flatten(program.graph_module, None)


def _flatten(module: fx.GraphModule, autocast: torch.dtype | None) -> None:
    """Put regions of `module` in line; its own operators run under autocast to this dtype."""
    found = False
    for node in list(module.graph.nodes):
        region = _region(module, node, autocast)
        if region is not None:
            inner, operands, detach, dtype = region
            _flatten(inner, dtype)
            _inline(module.graph, node, inner, operands, detach)
            found = True
        elif autocast is not None and isinstance(node.target, torch._ops.OpOverload):
            _cast_operands(module.graph, node, autocast)
            found = True
    if not found:
        return
    for node in list(module.graph.nodes):
        if node.op == "get_attr" and not node.users:
            module.graph.erase_node(node)
    module.recompile()


def _region(
    root: torch.nn.Module, node: fx.Node, autocast: torch.dtype | None
) -> tuple[fx.GraphModule, tuple[Any, ...], bool, torch.dtype | None] | None:
    """The nested program of a node, its operands, whether its results are detached, and its autocast."""
    name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
    detach = False
    arguments: tuple[Any, ...] = node.args
    if name == _GRAD:
        enabled, region, *operands = arguments
        detach = not enabled
    elif name == _AUTOCAST:
        device, dtype, enabled, _, region, *operands = arguments
        autocast = (dtype or torch.get_autocast_dtype(device)) if enabled else None
    else:
        return None
    inner = root.get_submodule(region.target) if isinstance(region, fx.Node) else None
    return (inner, tuple(operands), detach, autocast) if isinstance(inner, fx.GraphModule) else None


def _cast_operands(graph: fx.Graph, node: fx.Node, dtype: torch.dtype) -> None:
    """Put casts before an operator, if autocast makes some."""
    to = _operand_dtype(node, dtype)
    if to is None:
        return
    made: dict[fx.Node, fx.Node] = {}
    with graph.inserting_before(node):
        for source in node.all_input_nodes:
            value = source.meta.get("val")
            if isinstance(value, torch.Tensor) and value.dtype is not to and value.is_floating_point():
                made[source] = graph.call_function(autocast_to, (source, to))
                made[source].meta = {**node.meta, "val": autocast_to(value, to)}
    node.args = fx.map_arg(node.args, lambda n: made.get(n, n))
    node.kwargs = fx.map_arg(node.kwargs, lambda n: made.get(n, n))


def _operand_dtype(node: fx.Node, dtype: torch.dtype) -> torch.dtype | None:
    """What autocast casts an operator's operands to: with it, the result has the type that was captured."""
    captured = [v.dtype for v in pytree.tree_leaves(node.meta.get("val")) if isinstance(v, torch.Tensor)]
    for to in (None, dtype, torch.float32) if captured else ():

        def operand(source: fx.Node, to: torch.dtype | None = to) -> Any:
            value = source.meta["val"]
            if not isinstance(value, torch.Tensor):
                return value
            bare = torch.empty(shape_of(value), dtype=value.dtype, device="meta")
            return bare if to is None else autocast_to(bare, to)

        try:
            result = node.target(*fx.map_arg(node.args, operand), **fx.map_arg(node.kwargs, operand))  # type: ignore[operator]
        except Exception:  # noqa: S112  # an operator that does not take these types
            continue
        if [v.dtype for v in pytree.tree_leaves(result) if isinstance(v, torch.Tensor)] == captured:
            return to
    return None


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
