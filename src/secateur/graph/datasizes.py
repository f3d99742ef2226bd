"""Sizes that depend on the data, such as the number of tokens for an expert: measured on example inputs."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from secateur.graph.inline import Interpreter
from secateur.graph.nodes import lifted, remember_size, tensor_of


def measure_sizes(program: ExportedProgram) -> None:
    """Run a program once on its example inputs, and remember the sizes that depend on the data.

    Rules and costs then treat these like any other size. A program without such sizes is not run, nor one on
    the meta device, which has no values. A program of a branch that these inputs do not take may fail: then
    its sizes stay unknown, and what reads them is frozen.
    """
    nodes = nodes_of_data(program)
    if not nodes or program.example_inputs is None:
        return
    values = arguments_of(program, pytree.tree_leaves(program.example_inputs))
    if any(isinstance(value, Tensor) and value.is_meta for value in values):
        return
    with torch.no_grad(), suppress(Exception):
        _Measuring(program.graph_module, frozenset(nodes)).run(*values)


def nodes_of_data(program: ExportedProgram) -> list[fx.Node]:
    """Return the nodes whose values have a size that depends on the data."""
    return [
        n
        for n in program.graph.nodes
        if any(depends_on_data(s) for leaf in pytree.tree_leaves(n.meta.get("val")) for s in _sizes(leaf))
    ]


def arguments_of(program: ExportedProgram, leaves: Iterable[Any]) -> list[Any]:
    """Return all arguments of a program's graph, for these leaves of the inputs.

    Buffers are copied; so are parameters, if anything is written in place (an embedding with `max_norm`).
    """
    given = iter(leaves)
    schemas = (getattr(node.target, "_schema", None) for node in program.graph.nodes)
    reads = not any(schema is not None and schema.is_mutable for schema in schemas)
    values: list[Any] = []
    for _, kind, name in lifted(program):
        if kind is InputKind.USER_INPUT or name is None:
            values.append(next(given))
        else:
            own: Any = tensor_of(program, name)
            if isinstance(own, torch.Generator):
                values.append(own.clone_state())
            else:
                values.append(own.detach() if reads and kind is InputKind.PARAMETER else own.detach().clone())
    return values


class _Measuring(Interpreter):
    """Runs a program and compares the sizes of its values with those that the capture could not know."""

    def __init__(self, module: fx.GraphModule, nodes: frozenset[fx.Node]) -> None:
        super().__init__(module)
        self._nodes = nodes

    def run_node(self, n: fx.Node) -> Any:
        if n.target is torch.ops.aten._assert_scalar.default:
            return None
        value = super().run_node(n)
        if n in self._nodes:
            found = pytree.tree_leaves(value)
            for captured, actual in zip(pytree.tree_leaves(n.meta["val"]), found, strict=True):
                for size, number in zip(_sizes(captured), _sizes(actual), strict=True):
                    if depends_on_data(size):
                        remember_size(size, int(number))
        return value


def _sizes(value: Any) -> list[Any]:
    """Return the sizes of a tensor. A number counts as a size."""
    return list(value.shape) if isinstance(value, Tensor) else [value]


def depends_on_data(size: Any) -> bool:
    """Whether a captured size depends on the values of the inputs, and not only on their sizes."""
    return isinstance(size, torch.SymInt) and size.node.hint is None
