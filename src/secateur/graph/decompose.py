"""Operators without a rule are replaced by those that they consist of, where PyTorch says which these are."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from secateur.compat.operators import made_of
from secateur.graph.inline import splice
from secateur.graph.rules import find_rule, only_asks

DEPTH = 3
"""How many times in a row an operator may be replaced by those that it consists of."""

_NUMBERS = (torch.SymInt, torch.SymFloat, torch.SymBool)


def decompose(program: ExportedProgram) -> None:
    """Replace operators that have no rule by operators that have one, in place.

    ``torch.inner`` becomes a product of matrices, for example, and `torch.quantile` a sort. An operator stays
    if PyTorch does not say what it consists of, or if a part of it has no rule either.
    """
    if _decompose(program.graph_module.graph, DEPTH):
        program.graph_module.recompile()


def _decompose(graph: fx.Graph, depth: int) -> bool:
    """Replace the operators of a graph, and return whether there were any."""
    replaced = False
    for node in list(graph.nodes):
        if not _is_followed(node) and (found := _parts(node, depth)) is not None:
            inner, operands = found

            def note(_: fx.Node, copy: fx.Node, whole: fx.Node = node) -> None:
                copy.meta = {**whole.meta, "val": copy.meta.get("val")}

            splice(graph, node, inner, operands, note)
            replaced = True
    return replaced


def _is_followed(node: fx.Node) -> bool:
    """Whether a node needs no rule, or has one."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return True
    return only_asks(node) or find_rule(node) is not None


def _parts(node: fx.Node, depth: int) -> tuple[fx.GraphModule, list[fx.Node]] | None:
    """Return the operators that a node consists of, and their operands; None if some have no rule."""
    target: Any = node.target
    function, is_composite = made_of(target)
    leaves, spec = pytree.tree_flatten((node.args, node.kwargs))
    values = [leaf.meta.get("val") if isinstance(leaf, fx.Node) else leaf for leaf in leaves]
    varying = [k for k, value in enumerate(values) if isinstance(value, (torch.Tensor, *_NUMBERS))]
    modes = [mode for k in varying if (mode := getattr(values[k], "fake_mode", None)) is not None]
    draws = torch.Tag.nondeterministic_seeded in target.tags  # its decomposition may draw other numbers
    if function is None or not modes or depth == 0 or (draws and not is_composite):
        return None

    def call(*operands: Any) -> Any:
        by_number = dict(zip(varying, operands, strict=True))
        filled = [by_number.get(k, value) for k, value in enumerate(values)]
        args, kwargs = pytree.tree_unflatten(filled, spec)
        found = function(*args, **kwargs)
        return list(found) if isinstance(found, tuple) else found

    before = _guard_count(modes[0])
    try:
        with modes[0]:
            inner = make_fx(call, pre_dispatch=not is_composite)(*(values[k] for k in varying))
    except Exception:  # PyTorch may fail in any way
        return None
    if _guard_count(modes[0]) != before:  # these operators are right for some sizes only
        return None
    _name_sizes(inner.graph)
    results = fx.node.map_arg(inner.graph.output_node().args[0], lambda result: result.meta["val"])
    if _shapes(results) != _shapes(node.meta.get("val")):  # sizes that depend on data have new symbols
        return None
    _decompose(inner.graph, depth - 1)
    followed = all(map(_is_followed, inner.graph.nodes)) and not inner.graph.find_nodes(op="get_attr")
    return (inner, [leaves[k] for k in varying]) if followed else None


def _guard_count(mode: Any) -> int:
    return 0 if mode.shape_env is None else len(mode.shape_env.guards)


def _shapes(value: Any) -> list[str]:
    leaves = pytree.tree_leaves(value)
    return [str(list(leaf.shape)) for leaf in leaves if isinstance(leaf, torch.Tensor)]


def _name_sizes(graph: fx.Graph) -> None:
    """Ask for each size by its axis, not for all sizes and then for one of them."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.size.default):
        for user in list(node.users):
            if user.target is operator.getitem:
                user.target = torch.ops.aten.sym_size.int
                user.args = (node.args[0], user.args[1])
        if not node.users:
            graph.erase_node(node)
