"""The positions of a layer's channels in an activation that operators only moved."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, fx

from secateur.graph.nodes import hint, shape_of
from secateur.graph.rules.naming import operator_name

_MOVES = frozenset(
    f"aten.{name}"
    for name in (
        "view.default", "reshape.default", "_unsafe_view.default", "flatten.using_ints", "unflatten.int",
        "permute.default", "transpose.int", "t.default", "mT.default", "swapaxes.default", "swapdims.default",
        "movedim.int", "movedim.intlist", "unsqueeze.default", "squeeze.default", "squeeze.dim",
        "squeeze.dims", "expand.default", "repeat_interleave.self_int", "slice.Tensor", "narrow.default",
        "select.int", "split.Tensor", "split_with_sizes.default", "chunk.default", "unbind.int",
    )
) | {"operator.getitem"}  # fmt: skip
"""Operators that return numbers of their first operand, at other positions."""

_SAME = frozenset(
    f"aten.{name}"
    for name in (
        "clone.default", "contiguous.default", "detach.default", "alias.default", "to.dtype", "to.device",
        "to.dtype_layout", "_to_copy.default", "dropout.default", "mul.Tensor", "div.Tensor", "mul.Scalar",
        "div.Scalar",
    )
)  # fmt: skip
"""Operators with one operand that leave numbers where they are, and at most scale all of them alike."""


def path_back(node: fx.Node, ends: Collection[fx.Node]) -> list[fx.Node] | None:
    """Return the operators from one of `ends` to a node; None if one of them does more than move."""
    found: list[fx.Node] = []
    while node not in ends:
        if not _moves(node):
            return None
        found.insert(0, node)
        node = node.all_input_nodes[0]
    return found


def path_ahead(node: fx.Node) -> list[fx.Node]:
    """Return the operators after a node that only move its numbers, as long as each is read once."""
    found: list[fx.Node] = []
    while len(node.users) == 1 and _moves(reader := next(iter(node.users))) and _reads(reader) is node:
        found.append(reader)
        node = reader
    return found


def moved(numbers: Tensor, path: list[fx.Node]) -> Tensor:
    """Move numbers as the operators of a path move an activation.

    Args:
        numbers: A number for each position of the activation, in the shape that it has in the capture.
        path: From `path_back` or `path_ahead`.
    """
    value: Any = numbers
    for node in path:
        if operator_name(node) in _SAME:
            continue
        source = _reads(node)
        if isinstance(value, Tensor):
            value = value.contiguous()  # the path may have a copy, which is left out here

        def given(n: fx.Node, source: fx.Node = source, value: Any = value) -> Any:
            return value if n is source else hint(n.meta["val"])

        args, kwargs = fx.map_arg((node.args, node.kwargs), given)
        value = node.target(*_with_hints(args), **_with_hints(kwargs))  # type: ignore[operator]
    found: Tensor = value
    return found


def numbered(node: fx.Node, axis: int) -> Tensor:
    """Return the number of the position along an axis, in the shape of a node's value."""
    shape = shape_of(node)
    axis %= len(shape)
    numbers = torch.arange(shape[axis]).reshape([-1 if k == axis else 1 for k in range(len(shape))])
    return numbers.expand(shape)


def _moves(node: fx.Node) -> bool:
    name = operator_name(node)
    tensors = [n for n in node.all_input_nodes if not isinstance(n.meta.get("val"), int | torch.SymInt)]
    return len(tensors) == 1 and _reads(node) is tensors[0] and name in _MOVES | _SAME


def _reads(node: fx.Node) -> fx.Node:
    return node.all_input_nodes[0]


def _with_hints(values: Any) -> Any:
    """Replace symbolic sizes in arguments by their values in the capture."""
    if isinstance(values, dict):
        return {name: _with_hints(value) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return type(values)(_with_hints(value) for value in values)
    return hint(values) if isinstance(values, torch.SymInt) else values
