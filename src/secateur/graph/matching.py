"""Which operator of one captured program is which of another, captured from the same model at other sizes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable

from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from secateur.graph.nodes import lifted


def matched(program: ExportedProgram, other: ExportedProgram) -> dict[fx.Node, fx.Node]:
    """For each node of `program`, the one of `other` that stands for the same; without those that have none.

    Calls are the same if their module, operator and the tensors of the model that they read are, the first
    such call being the first, and so on. Calls that come another number of times, as in a loop over the
    length, have no counterpart.
    """
    found: dict[fx.Node, fx.Node] = {}
    for by_key, others in zip(_by_key(program), _by_key(other), strict=True):
        for key, nodes in by_key.items():
            if len(nodes) == len(others.get(key, ())):
                found |= zip(nodes, others[key], strict=True)
    return found


def _by_key(program: ExportedProgram) -> tuple[dict[Hashable, list[fx.Node]], dict[Hashable, list[fx.Node]]]:
    """Placeholders by what they stand for, and calls by what they do, in order."""
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
