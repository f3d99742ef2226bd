"""Sizes that depend on the data, such as how many tokens an expert gets: what example inputs make them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from secateur.graph.inline import Interpreter
from secateur.graph.nodes import lifted, remember_size, tensor_of


def measure_sizes(program: ExportedProgram) -> None:
    """Run a program that has such sizes once, on the inputs it was captured with, and remember them.

    Rules and costs then treat them like any other size. A program without such sizes is not run, nor is one
    on the meta device, where nothing can be: what reads such a size is frozen there.
    """
    nodes = [
        n
        for n in program.graph.nodes
        if any(_is_unknown(s) for leaf in pytree.tree_leaves(n.meta.get("val")) for s in _sizes(leaf))
    ]
    if not nodes or program.example_inputs is None:
        return
    values = arguments_of(program, pytree.tree_leaves(program.example_inputs))
    if any(isinstance(value, Tensor) and value.is_meta for value in values):
        return
    with torch.no_grad():
        _Measuring(program.graph_module, frozenset(nodes)).run(*values)


def arguments_of(program: ExportedProgram, leaves: Iterable[Any]) -> list[Any]:
    """What a program's graph takes for the leaves of the inputs: buffers, which it may write, are copies."""
    given = iter(leaves)
    values: list[Any] = []
    for _, kind, name in lifted(program):
        if kind is InputKind.USER_INPUT or name is None:
            values.append(next(given))
        else:
            held: Any = tensor_of(program, name)
            if isinstance(held, torch.Generator):
                values.append(held.clone_state())
            else:
                values.append(held.detach() if kind is InputKind.PARAMETER else held.detach().clone())
    return values


class _Measuring(Interpreter):
    """Compares what nodes give with the sizes that capture left open."""

    def __init__(self, module: fx.GraphModule, nodes: frozenset[fx.Node]) -> None:
        super().__init__(module)
        self._nodes = nodes

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self._nodes:
            found = pytree.tree_leaves(value)
            for captured, actual in zip(pytree.tree_leaves(n.meta["val"]), found, strict=True):
                for size, number in zip(_sizes(captured), _sizes(actual), strict=True):
                    if _is_unknown(size):
                        remember_size(size, int(number))
        return value


def _sizes(value: Any) -> list[Any]:
    """A tensor's sizes; a number is one itself."""
    return list(value.shape) if isinstance(value, Tensor) else [value]


def _is_unknown(size: Any) -> bool:
    return isinstance(size, torch.SymInt) and size.node.hint is None
