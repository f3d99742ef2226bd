"""The graph of a captured program as plain data, so that the program pickles with all its attributes.

`fx.GraphModule` pickles its Python code, and traces it again when it is loaded. That loses what the program
knows of its inputs, and fails for code that asks what its arguments are.
"""

from __future__ import annotations

import functools
import pickle
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_aggregate

ACCEPTED = "_accepted"
"""The attribute in which a program notes the calls that it takes."""
_DERIVED = ("_graph", "_code", "_lineno_map", "_prologue_start", "_in_spec", "_out_spec", ACCEPTED)
"""The attributes that follow from the graph, and what a program learns by its calls."""
_META = ("nn_module_stack", "stack_trace")


class Pickled(fx.GraphModule):
    """A graph that runs as a module. It is pickled with all attributes of the module."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Say how to pickle the module."""
        attributes = {k: v for k, v in vars(self).items() if k not in _DERIVED}
        attributes["meta"] = _Quiet(attributes["meta"])
        kind, *_ = (c for c in type(self).__mro__[1:] if issubclass(c, Pickled))  # each module has its own
        return _unpickled, (kind, type(self).__name__, stored(self.graph), attributes)


def pickled(module: fx.GraphModule) -> Pickled:
    """Make a module of this kind of another one, in which nested ones are of this kind too."""
    new = Pickled(module, module.graph, class_name=type(module).__name__)
    for name, child in new.named_children():
        if isinstance(child, fx.GraphModule):
            setattr(new, name, pickled(child))
    return new.train(module.training)


def _unpickled(kind: type[Pickled], name: str, graph: Stored, attributes: dict[str, Any]) -> Pickled:
    """Make a pickled module again. `attributes`: all but those in `_DERIVED`."""
    root = nn.Module()
    vars(root).update(attributes)
    new = kind(root, restored(graph), class_name=name)
    vars(new).update(attributes)
    return new


@dataclass(frozen=True)
class _Node:
    """A node, by its number."""

    number: int


@dataclass(frozen=True)
class _Operator:
    """An operator of PyTorch, by its path in ``torch.ops``."""

    path: tuple[str, ...]

    def found(self) -> Any:
        return functools.reduce(getattr, self.path, torch.ops)


@dataclass(frozen=True)
class Step:
    """One node of a graph. Nodes and operators in its arguments are replaced by what names them."""

    op: str
    name: str
    target: Any
    args: Any
    kwargs: Any
    meta: dict[str, Any]


@dataclass(frozen=True)
class Stored:
    """A graph as plain data."""

    steps: tuple[Step, ...]
    signature: Any


def stored(graph: fx.Graph) -> Stored:
    """Return a graph as plain data."""
    number = {node: k for k, node in enumerate(graph.nodes)}

    def named(value: Any) -> Any:
        return _Node(number[value]) if isinstance(value, fx.Node) else _named(value)

    steps = tuple(
        Step(
            node.op,
            node.name,
            _named(node.target),
            map_aggregate(node.args, named),
            map_aggregate(node.kwargs, named),
            {key: node.meta[key] for key in _META if key in node.meta},
        )
        for node in graph.nodes
    )
    return Stored(steps, _Quiet(getattr(graph._codegen, "pytree_info", None)))


def restored(data: Stored) -> fx.Graph:
    """Make the graph again."""
    graph, nodes = fx.Graph(), list[fx.Node]()

    def found(value: Any) -> Any:
        return nodes[value.number] if isinstance(value, _Node) else _found(value)

    for step in data.steps:
        args, kwargs = map_aggregate(step.args, found), map_aggregate(step.kwargs, found)
        node = graph.create_node(step.op, _found(step.target), args, kwargs, name=step.name)
        node.meta.update(step.meta)
        nodes.append(node)
    if data.signature is not None:
        graph.set_codegen(fx.graph._PyTreeCodeGen(data.signature))
    return graph


class _Quiet:
    """Wraps a value, which is then loaded without PyTorch's warning about its own internals."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __reduce__(self) -> tuple[Any, ...]:
        return _quietly, (pickle.dumps(self.value),)


def _quietly(data: bytes) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
        return pickle.loads(data)


def _named(target: Any) -> Any:
    if isinstance(target, torch._ops.OpOverload):
        namespace, _, name = target._schema.name.partition("::")
        return _Operator((namespace, name, target._overloadname))
    if isinstance(target, torch._ops.HigherOrderOperator):
        return _Operator(("higher_order", str(target.name())))
    return target


def _found(target: Any) -> Any:
    return target.found() if isinstance(target, _Operator) else target
