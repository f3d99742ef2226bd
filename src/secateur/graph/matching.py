"""Pairs of nodes that do the same in two programs, which are captures of one model at two sizes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable

from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from secateur.graph.nodes import lifted


def matched(program: ExportedProgram, other: ExportedProgram) -> dict[fx.Node, fx.Node]:
    """Find, for each node of `program`, the node of `other` that does the same.

    Two calls are the same if they have the same module, the same operator, and read the same tensors of the
    model. If there are several such calls, the first is the same as the first, and so on. If one program has
    more of them than the other, as with a loop over the length, they are left out.
    """
    found: dict[fx.Node, fx.Node] = {}
    for by_key, others in zip(_by_key(program), _by_key(other), strict=True):
        for key, nodes in by_key.items():
            if len(nodes) == len(others.get(key, ())):
                found |= zip(nodes, others[key], strict=True)
    return found


def _by_key(program: ExportedProgram) -> tuple[dict[Hashable, list[fx.Node]], dict[Hashable, list[fx.Node]]]:
    """Group placeholders by what they stand for, and calls by what they do, in order."""
    inputs: dict[Hashable, list[fx.Node]] = defaultdict(list)
    names: dict[fx.Node, str] = {}
    for node, kind, target in lifted(program):
        own = kind in (InputKind.PARAMETER, InputKind.BUFFER)
        if own:
            names[node] = str(target)
        inputs[kind, target if own else node.name].append(node)
    calls: dict[Hashable, list[fx.Node]] = defaultdict(list)
    for node in program.graph.nodes:
        if node.op == "call_function":
            read = tuple(names[n] for n in node.all_input_nodes if n in names)
            calls[_module(node), str(node.target), read].append(node)
    return inputs, calls


def _module(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    return next((path for path, _ in reversed(list(stack.values()))), "")
