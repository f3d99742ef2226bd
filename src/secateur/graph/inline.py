"""Nested programs, which capture makes of `torch.no_grad()` and autocast, become part of the program."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from secateur.graph.writes import is_read_by_code

_GRAD = "wrap_with_set_grad_enabled"
_AUTOCAST = "wrap_with_autocast"

Mode = tuple[Any, ...]
"""``("grad", enabled)`` or ``("autocast", device type, dtype, enabled, cache enabled)``."""

_MODES = "secateur_modes"


def modes_of(node: fx.Node) -> tuple[Mode, ...]:
    """The modes in which an operator was captured, outermost first."""
    found: tuple[Mode, ...] = node.meta.get(_MODES, ())
    return found


@contextmanager
def entered(modes: tuple[Mode, ...]) -> Iterator[None]:
    """Run the block in these modes."""
    with ExitStack() as stack:
        for kind, *values in modes:
            if kind == "grad":
                stack.enter_context(torch.set_grad_enabled(values[0]))
            else:
                device, dtype, enabled, cached = values
                stack.enter_context(torch.autocast(device, dtype, enabled, cached))
        yield


def in_modes(modes: tuple[Mode, ...], function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function in these modes."""
    with entered(modes):
        return function(*args, **kwargs)


class Interpreter(fx.Interpreter):
    """Runs the operators of a program, each in the modes in which it was captured."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.extra_traceback = False  # else the node is appended to every message, also to secateur's own

    def run_node(self, n: fx.Node) -> Any:
        """Run one operator."""
        with entered(modes_of(n)):
            return super().run_node(n)


def inline_regions(program: ExportedProgram) -> None:
    """Replace nested programs by their operators, in place. Each operator keeps its modes: see `modes_of`.

    The results of a `torch.no_grad()` region are detached, so that gradients are right even where the modes
    are not used. Assertions of a dtype or a device are removed: capture adds them, not the model.
    """
    graph = program.graph_module.graph
    while (found := _first_region(program)) is not None:  # regions may lie inside regions
        _inline(graph, *found)
    for node in reversed(list(graph.nodes)):
        is_check = str(node.target).startswith("aten._assert_tensor_metadata") and not is_read_by_code(node)
        if is_check or (node.op == "get_attr" and not node.users):
            graph.erase_node(node)
    program.graph_module.recompile()


def _first_region(program: ExportedProgram) -> tuple[fx.Node, fx.GraphModule, tuple[Any, ...], Mode] | None:
    for node in program.graph_module.graph.nodes:
        found = _region(program.graph_module, node)
        if found is not None:
            return node, *found
    return None


def _region(root: torch.nn.Module, node: fx.Node) -> tuple[fx.GraphModule, tuple[Any, ...], Mode] | None:
    """Return the nested program of a node, its operands and its mode; None if it has none."""
    name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
    mode: Mode
    if name == _GRAD:
        enabled, region, *operands = node.args
        mode = ("grad", enabled)
    elif name == _AUTOCAST:
        device, dtype, enabled, cached, region, *operands = node.args
        mode = ("autocast", device, dtype, enabled, cached)
    else:
        return None
    if not isinstance(region, fx.Node) or not isinstance(region.target, str):
        return None
    inner = root.get_submodule(region.target)
    return (inner, tuple(operands), mode) if isinstance(inner, fx.GraphModule) else None


def _inline(
    graph: fx.Graph, node: fx.Node, inner: fx.GraphModule, operands: tuple[Any, ...], mode: Mode
) -> None:
    """Copy the operators of a nested program to the place of its node, and remove the node."""

    def note(source: fx.Node, copy: fx.Node) -> None:
        copy.meta[_MODES] = (*modes_of(node), mode, *modes_of(source))

    splice(graph, node, inner, operands, note, detached=mode == ("grad", False))


def splice(
    graph: fx.Graph,
    node: fx.Node,
    inner: fx.GraphModule,
    operands: Sequence[Any],
    note: Callable[[fx.Node, fx.Node], None],
    *,
    detached: bool = False,
) -> None:
    """Put the operators of another program in the place of a node of a graph.

    Args:
        graph: The graph.
        node: The node, which is removed.
        inner: The other program.
        operands: What takes the places of its placeholders.
        note: Called with each operator of `inner` and its copy, to complete the copy's notes.
        detached: Whether the results are detached from their gradients.
    """
    copies: dict[fx.Node, Any] = {}
    parameters = iter(operands)
    results: Any = ()
    with graph.inserting_before(node):
        for source in inner.graph.nodes:
            if source.op == "placeholder":
                copies[source] = next(parameters)
            elif source.op == "output":
                results = fx.node.map_arg(source.args[0], copies.__getitem__)
            elif source.op == "get_attr":
                owner = node.graph.owning_module
                name = f"{node.name}_{source.target}"
                setattr(owner, name, getattr(inner, source.target))
                copies[source] = graph.get_attr(name)
            else:
                copies[source] = graph.node_copy(source, copies.__getitem__)
                note(source, copies[source])
        if detached:
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
