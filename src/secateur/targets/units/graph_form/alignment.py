"""A comparison of two captures of one model, operator by operator.

The differences show which arguments depend on how the model is run: on the mode, the dtype or the sizes.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from secateur.graph.binding import all_by_name
from secateur.graph.inline import modes_of
from secateur.graph.nodes import lifted, where
from secateur.graph.rules import operator_name
from secateur.graph.writes import dead_nodes

Source = tuple[str, str | int]
"""Where a value comes from: ``("call", number)``, ``("tensor", name)`` or ``("input", number)``."""

Place = tuple[str | int, ...]
"""A place in the arguments of a call: the name of the argument, then positions in lists."""


class PathsDifferError(Exception):
    """Raised where two captures do not run the same operators."""


@dataclass(frozen=True)
class Difference:
    """An argument that has different values in two captures.

    Attributes:
        call: The number of the call.
        place: The place of the value in the call's arguments.
        first: The value in the first capture.
        second: The value in the second capture.
    """

    call: int
    place: Place
    first: Any
    second: Any


class Steps:
    """The calls of a program that compute tensors and that something reads, in order.

    Attributes:
        nodes: The calls, then the output.
        number: For each call, its number among these.
        sources: For each node that holds a tensor or an input of the model, where it comes from.
        node_of: For each source, its node.
    """

    def __init__(self, program: ExportedProgram) -> None:
        dead = dead_nodes(program.graph)
        self.sources: dict[fx.Node, Source] = {}
        inputs = 0
        for node, kind, name in lifted(program):
            if kind is InputKind.USER_INPUT or name is None:
                self.sources[node] = ("input", inputs)
                inputs += 1
            else:
                self.sources[node] = ("tensor", name)
        self.nodes: list[fx.Node] = []
        self.number: dict[fx.Node, int] = {}
        self.node_of = {source: node for node, source in self.sources.items()}
        for node in program.graph.nodes:
            if node in dead or not (node.op == "output" or _computes(node)) or self._counts_batches(node):
                continue
            if _takes_all(node) and node.args[0] in self.sources:
                self.sources[node] = self.sources[node.args[0]]
                continue
            source: Source = ("call", len(self.nodes))
            self.number[node], self.sources[node], self.node_of[source] = len(self.nodes), source, node
            self.nodes.append(node)

    def _counts_batches(self, node: fx.Node) -> bool:
        """Whether a call counts the batches of a batch norm. Captures have it in training mode only."""
        if operator_name(node) != "aten.add_.Tensor":
            return False
        kind, name = self.sources.get(node.args[0], ("", ""))  # type: ignore[arg-type]
        return kind == "tensor" and str(name).endswith("num_batches_tracked")

    def compare(self, other: Steps) -> tuple[list[Difference], dict[tuple[int, Place], Source]]:
        """Compare another capture with this one.

        Returns:
            The arguments with other values; and the arguments whose true source only the other capture shows.
            Such arguments occur after an operator that returned its own operand. A capture then mistakes
            every later use of the operand for a use of the result: after ``y = dropout(x)`` in evaluation
            mode, ``x + y`` becomes ``y + y``.

        Raises:
            PathsDifferError: The two do not run the same operators on the same values.
        """
        differences: list[Difference] = []
        true: dict[tuple[int, Place], Source] = {}
        for k, (first, second) in enumerate(zip(self.nodes, other.nodes, strict=False)):
            if first.target != second.target or modes_of(first) != modes_of(second):
                raise PathsDifferError(where(second) or where(first) or second.name)
            first_arguments, second_arguments = dict(arguments(first)), dict(arguments(second))
            if first_arguments.keys() != second_arguments.keys():
                raise PathsDifferError(where(second) or second.name)
            for place, a in first_arguments.items():
                b = second_arguments[place]
                if isinstance(a, fx.Node) and a in self.sources:
                    source = other.sources.get(b) if isinstance(b, fx.Node) else None
                    if source == self.sources[a]:
                        continue
                    if source is not None and source in self.operands_returned_by(a):
                        true[k, place] = source
                    elif source is None or self.sources[a] not in other.operands_returned_by(b):
                        raise PathsDifferError(where(second) or second.name)
                elif not _alike(a, b):
                    differences.append(Difference(k, place, a, b))
        if len(self.nodes) != len(other.nodes):
            longer = max(self.nodes, other.nodes, key=len)
            raise PathsDifferError(where(longer[min(len(self.nodes), len(other.nodes))]))
        return differences, true

    def operands_returned_by(self, node: fx.Node) -> list[Source]:
        """Return the values that a node is itself, because one operator or several returned their operand."""
        found = []
        while (all_of := _takes_all(node)) or _returns_operand(node):
            node = node.args[0]  # type: ignore[assignment]
            if not all_of:
                found.append(self.sources[node])
        return found


def arguments(node: fx.Node) -> Iterator[tuple[Place, Any]]:
    """Yield the arguments of a call, defaults included, and each entry of lists by itself."""
    given: dict[Any, Any] = dict(enumerate(node.args)) | dict(node.kwargs)
    if getattr(node.target, "_schema", None) is not None:
        given = all_by_name(node.target, node.args, node.kwargs)
    if operator_name(node) == "aten.slice.Tensor" and given["start"] is None:
        given["start"] = 0  # as captures of fixed sizes write it
    for name, value in given.items():
        yield from _entries((name,), value)


def _entries(place: Place, value: Any) -> Iterator[tuple[Place, Any]]:
    if isinstance(value, list | tuple):
        for k, entry in enumerate(value):
            yield from _entries((*place, k), entry)
    else:
        yield place, value


def _computes(node: fx.Node) -> bool:
    """Whether a call gives tensors."""
    value = node.meta.get("val")
    values = value if isinstance(value, list | tuple) else [value]
    return node.op == "call_function" and any(isinstance(v, torch.Tensor) for v in values)


def _takes_all(node: fx.Node) -> bool:
    """Whether a call is ``x[:]``. A capture leaves it out where it knows the size."""
    if operator_name(node) != "aten.slice.Tensor":
        return False
    start, end, step = (*node.args[2:], None, None, None)[:3]
    whole = start in _NOTHING and step in (None, 1)
    return bool(whole and (end is None or end == _TO_THE_END))


_TO_THE_END, _NOTHING = 2**63 - 1, (None, 0)


def _alike(a: Any, b: Any) -> bool:
    """Whether two constants mean the same. Two sizes always do, as they may be computed; so do devices."""
    if isinstance(a, fx.Node) and isinstance(b, fx.Node) and a.op == b.op == "get_attr":
        return _nested_code(a) == _nested_code(b)
    if isinstance(a, fx.Node) or isinstance(b, fx.Node):
        return _is_number(a) and _is_number(b)
    if isinstance(a, torch.device) and isinstance(b, torch.device):
        return True
    return type(a) is type(b) and bool(a == b or (a != a and b != b))


def _nested_code(node: fx.Node) -> str:
    """Return the code of the nested program that a node stands for."""
    module = node.graph.owning_module
    return str(getattr(module and module.get_submodule(str(node.target)), "code", node.target))


def _is_number(value: Any) -> bool:
    """Whether a value is a number, or a node that computes one."""
    if isinstance(value, fx.Node):
        return value.op != "get_attr"
    return isinstance(value, int | float) and not isinstance(value, bool)


_CASTS = ("aten.to.", "aten.type_as.", "aten.contiguous.")
_DROPOUTS = frozenset(
    f"aten.{name}.default"
    for name in ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
)


def _returns_operand(node: fx.Node) -> bool:
    """Whether an operator did nothing in the capture and returned its operand itself."""
    if node.op != "call_function" or node.target is operator.getitem:
        return False
    name = operator_name(node)
    if name in _DROPOUTS:
        return bool(node.args[1] == 0 or node.args[2] is False)
    source = node.args[0] if node.args else None
    if not name.startswith(_CASTS) or not isinstance(source, fx.Node):
        return False
    before, after = source.meta.get("val"), node.meta.get("val")
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return False
    return before.dtype == after.dtype and before.device == after.device
