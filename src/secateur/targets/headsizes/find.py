"""Find the attentions of a traced model whose heads may get another basis."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, fx
from torch.export.graph_signature import InputKind

from secateur.graph.graph import Graph
from secateur.graph.nodes import lifted, shape_of
from secateur.graph.rules.naming import operator_name
from secateur.targets.headsizes.moves import moved, numbered, path_ahead, path_back

_ATTENTION = "aten.scaled_dot_product_attention.default"
_PRODUCTS = ("aten.matmul.default",)
_LAYERS = {"aten.linear.default": (0, 1), "aten.addmm.default": (1, 2), "aten.mm.default": (0, 1)}
"""Layers that read their input's last axis, with the places of the input and of the weight."""


@dataclass(frozen=True, eq=False)
class Side:
    """One side of a product of activations, and the layer that produces it.

    Attributes:
        operand: The node that the product reads.
        tensors: Name of a weight or bias of the layer -> the axis along which its outputs lie.
        channels: The output of the layer behind each dimension of each head. [heads, dimensions]
        flipped: Whether dimensions are the operand's last axis but one.
    """

    operand: fx.Node
    tensors: Mapping[str, int]
    channels: Tensor
    flipped: bool = False

    def heads(self, value: Tensor, count: int) -> Tensor:
        """Return an operand's values by head, repeated for `count` heads. float64 [count, rows, size]"""
        rows = value.mT if self.flipped else value
        by_head = rows.reshape(-1, *rows.shape[-3:]).transpose(0, 1).flatten(1, 2).double()
        return by_head.repeat_interleave(count // len(by_head), 0)

    @property
    def kinds(self) -> Tensor:
        """For each head, the first head with the same channels: keys and values may serve several. [heads]"""
        same = (self.channels[:, None] == self.channels[None]).all(-1)
        return same.int().argmax(1)


@dataclass(frozen=True, eq=False)
class Match:
    """A product of queries and keys."""

    product: fx.Node
    query: Side
    key: Side


@dataclass(frozen=True, eq=False)
class Value:
    """What an attention sums, and the layer that reads the sums.

    Attributes:
        product: The node with the sums.
        value: What is summed.
        tensor: Name of the weight that reads the sums.
        axis: The axis along which its inputs lie.
        columns: The input of that layer in which each dimension of each head ends. [heads, dimensions]
    """

    product: fx.Node
    value: Side
    tensor: str
    axis: int
    columns: Tensor


class Finder:
    """Finds attentions in the captured program of a graph."""

    def __init__(self, graph: Graph) -> None:
        self._names = {
            node: name
            for node, kind, name in lifted(graph.program)
            if name is not None and kind is not InputKind.USER_INPUT
        }
        self._nodes = [n for n in graph.program.graph.nodes if n.op == "call_function"]
        self._made, self._read = self._axes(graph, "produce"), self._axes(graph, "consume")
        self._layers = {node: found for node in self._nodes if (found := self._tensors(node))}

    @staticmethod
    def _axes(graph: Graph, role: str) -> dict[str, int]:
        """The tensors of head sizes with one role, each with its axis."""
        return {p.tensor: p.axis for g in graph.head_sizes for p in g.slices if p.role == role}

    def _tensors(self, node: fx.Node) -> dict[str, int]:
        """The tensors of a layer that produces dimensions of heads; none if others read them too."""
        if operator_name(node) not in _LAYERS:
            return {}
        sources = [n for n in node.all_input_nodes if n in self._names]
        named = {self._names[n]: self._made.get(self._names[n], -1) for n in sources}
        alone = all(len(n.users) == 1 for n in sources)
        return named if named and alone and -1 not in named.values() else {}

    def matches(self) -> Iterator[Match]:
        """Products of queries and keys between which and their layers nothing mixes dimensions."""
        for node in self._nodes:
            if operator_name(node) == _ATTENTION:
                query, key = self._side(node.args[0]), self._side(node.args[1])
            elif operator_name(node) in _PRODUCTS:
                query, key = self._side(node.args[0]), self._side(node.args[1], flipped=True)
            else:
                continue
            if query is not None and key is not None and len(query.channels) % len(key.channels) == 0:
                if query.channels.shape[1] == key.channels.shape[1]:
                    yield Match(node, query, key)

    def values(self) -> Iterator[Value]:
        """Sums of values that a linear layer reads as they are."""
        for node in self._nodes:
            attends = operator_name(node) == _ATTENTION
            if not attends and operator_name(node) not in _PRODUCTS:
                continue
            value = self._side(node.args[2 if attends else 1])
            path = path_ahead(node)
            end = path[-1] if path else node
            reader = next(iter(end.users)) if len(end.users) == 1 else None
            if value is None or reader is None or operator_name(reader) not in _LAYERS:
                continue
            source, weight = (reader.args[k] for k in _LAYERS[operator_name(reader)])
            name = self._names.get(weight) if isinstance(weight, fx.Node) else None
            if source is not end or name not in self._read or len(weight.users) != 1:  # type: ignore[union-attr]
                continue
            columns = self._columns(node, path)
            if columns is not None and len(columns) % len(value.channels) == 0:
                yield Value(node, value, name, self._read[name], columns)

    def _side(self, operand: object, *, flipped: bool = False) -> Side | None:
        """Follow an operand of a product back to the layer that produces it; None if that is not possible."""
        if not isinstance(operand, fx.Node) or len(shape_of(operand)) < 4:
            return None
        path = path_back(operand, self._layers)
        if path is None:
            return None
        layer = path[0].all_input_nodes[0] if path else operand
        places = moved(numbered(layer, -1), path)
        places = places.mT if flipped else places
        heads = places.reshape(-1, *places.shape[-3:])  # [samples, heads, positions, dimensions]
        channels = heads[0, :, 0]
        if not bool((heads == channels[:, None]).all()) or bool((channels.diff(dim=1) == 0).all()):
            return None
        return Side(operand, self._layers[layer], channels, flipped)

    @staticmethod
    def _columns(node: fx.Node, path: list[fx.Node]) -> Tensor | None:
        """The input of the next layer in which each dimension of each head ends. [heads, dimensions]"""
        shape = shape_of(node)
        if len(shape) < 4:
            return None
        heads, dimensions = shape[-3], shape[-1]
        numbers = numbered(node, -3) * dimensions + numbered(node, -1)
        ends = moved(numbers, path)
        ends = ends.reshape(-1, ends.shape[-1])
        if not bool((ends == ends[0]).all()) or len(ends[0]) != heads * dimensions:
            return None
        return ends[0].argsort().reshape(heads, dimensions)
