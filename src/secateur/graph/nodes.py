"""Reading the nodes of a captured program: the tensors they stand for, sizes, arguments, source lines."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from secateur.graph.binding import all_by_name

UNNAMED = "lifted_tensor_"
"""The prefix that a capture gives to the names of tensors that are neither parameters nor buffers."""


def lifted(program: ExportedProgram) -> Iterator[tuple[fx.Node, InputKind, str | None]]:
    """Yield each placeholder of a program, with the kind and the name of what it stands for."""
    placeholders = [n for n in program.graph.nodes if n.op == "placeholder"]
    for node, spec in zip(placeholders, program.graph_signature.input_specs, strict=True):
        yield node, spec.kind, spec.target


def tensor_of(program: ExportedProgram, name: str) -> torch.Tensor:
    """Return the parameter, buffer or constant with this name."""
    found: torch.Tensor | None = program.state_dict.get(name)
    if found is None:
        found = program.constants[name]
    return found


_MEASURED = "secateur_measured_sizes"
"""Name of an attribute of a capture's shape environment: the measured sizes that depend on the data."""


def remember_size(size: torch.SymInt, number: int) -> None:
    """Remember the value of a size that depends on the data, for the example inputs.

    Values below two are remembered as two: to a rule, an axis of size 1 would be one that broadcasts.
    """
    vars(size.node.shape_env).setdefault(_MEASURED, {})[size.node.expr] = max(number, 2)


def hint(size: Any) -> int:
    """Return the value of a size in the capture. For a symbolic size, this adds no condition on it."""
    if isinstance(size, torch.SymInt):
        value = size.node.hint
        if value is None:
            value = getattr(size.node.shape_env, _MEASURED, {}).get(size.node.expr)
        if value is None:
            raise ValueError("the size depends on the data")
        return int(value)
    return int(size)


def is_open(size: Any) -> bool:
    """Whether a program takes any value for a size: it is symbolic, and nothing in the model fixed it."""
    return isinstance(size, torch.SymInt) and size.node.maybe_as_int() is None


def shape_of(value: Any) -> tuple[int, ...]:
    """Return the shape that a node's value has in the capture, or the shape of a tensor."""
    tensor = value.meta["val"] if isinstance(value, fx.Node) else value
    return tuple(hint(s) for s in tensor.shape)


def arguments_by_name(node: fx.Node) -> dict[str, Any]:
    """Return the arguments of a call by their names in the operator's schema, defaults included."""
    if getattr(node.target, "_schema", None) is None:
        return {str(i): a for i, a in enumerate(node.args)} | dict(node.kwargs)
    return all_by_name(node.target, node.args, node.kwargs)


_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in \S+\n\s*(?P<code>[^\n]*)')


def where(node: fx.Node) -> str:
    """Return the module and source line of a node: ``layer1.0 (net.py:12: x = x + y)``; empty if unknown."""
    stack = node.meta.get("nn_module_stack") or {}
    module = next((path for path, _ in reversed(list(stack.values())) if path), "")
    frames = list(_FRAME.finditer(node.meta.get("stack_trace") or ""))
    outside = [f for f in frames if "/torch/nn/" not in f["file"].replace("\\", "/")]
    if not outside:
        return module
    last = outside[-1]
    file = last["file"].replace("\\", "/").rsplit("/", 1)[-1]
    line = f"{file}:{last['line']}: {last['code'].strip()}"
    return f"{module} ({line})" if module else line


def draws_nothing(arguments: dict[str, Any]) -> bool:
    """Whether the arguments of an operator turn its random part off, such as dropout inside attention."""
    off = arguments.get("training") is False or arguments.get("train") is False
    return off or arguments.get("dropout_p") == 0
