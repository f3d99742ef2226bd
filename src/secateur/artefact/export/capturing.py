"""Capture a model for a file: with builtin output containers, without the user's code or data."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from secateur.graph.capture import capture
from secateur.graph.leaf import Place
from secateur.graph.programs import inputs_of, open_places


@dataclass(frozen=True, eq=False)
class Captured:
    """A model as one program of tensor operators.

    Attributes:
        model: What was captured.
        program: In evaluation mode. Its outputs are tensors in lists, tuples and dictionaries, so that a
            process without the model's library can unpack them; no example inputs, no source lines.
        inputs: The names of its tensor inputs, in order.
        outputs: A name for each of its tensor outputs, in order.
        dynamic: Whether the program takes any batch size.
        open: The axes of tensor inputs that may have any size. Tensors are numbered.
    """

    model: nn.Module
    program: ExportedProgram
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dynamic: bool
    open: frozenset[Place]


def captured(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], also: Collection[Place] | None = ()
) -> Captured:
    """Capture a model as one program.

    Args:
        model: Any module, or a captured program that `apply` returned. It is not changed.
        args: Positional inputs, on the model's device.
        kwargs: Keyword inputs.
        also: Axes that may have any size beside the batch, if the code allows it. Tensors are numbered. None:
            no axis may, nor the batch.

    Raises:
        CaptureError: If `torch.export` cannot capture the model.
    """
    found = capture(model, args, kwargs, also=also or (), exact=also is None)
    program = found.program
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    program.example_inputs = None
    outputs = _plain_outputs(program)
    names = tuple(n.name for n in inputs_of(program) if isinstance(n.meta.get("val"), torch.Tensor))
    return Captured(model, program, names, outputs, found.static is None, open_places(program))


def _plain_outputs(program: ExportedProgram) -> tuple[str, ...]:
    """Make the program return builtin containers only, in place. Return a name for each output tensor."""
    signature = program.module_call_graph[0].signature
    if signature is None:
        return ()
    old = signature.out_spec
    plain = _plain(pytree.tree_unflatten(list(range(old.num_leaves)), old))
    found, signature.out_spec = pytree.tree_flatten_with_path(plain)
    results = program.graph.output_node().args[0]
    values = list(results)[-len(found) :] if isinstance(results, list | tuple) else [results]
    names = []
    for (path, _), value in zip(found, values, strict=True):
        meta = getattr(value, "meta", {})
        if isinstance(meta.get("val"), torch.Tensor):
            names.append("_".join(str(getattr(k, "key", getattr(k, "idx", k))) for k in path))
    return tuple(f"output_{n}" if n.isdigit() else n or "output" for n in names)


def _plain(value: Any) -> Any:
    """Rebuild a model's output with builtin containers. Its leaves are numbers that stand for tensors.

    Dataclasses and other objects with attributes become dictionaries.
    """
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    if isinstance(value, tuple):
        return tuple(_plain(v) for v in value)
    if isinstance(value, int):
        return value
    names = (
        [f.name for f in dataclasses.fields(value)]
        if dataclasses.is_dataclass(value)
        else getattr(value, "__dict__", ())
    )
    return {name: _plain(getattr(value, name)) for name in names} if names else ()
