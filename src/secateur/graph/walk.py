"""The walk over a captured program: it calls the rule of each operator, in order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from secateur.graph.labels import Labels, Reason
from secateur.graph.nodes import lifted, shape_of, tensor_of, where
from secateur.graph.rules import Op, find_rule, only_asks, operator_name
from secateur.graph.rules.op import Value, Walk
from secateur.graph.splits import decide
from secateur.graph.writes import dead_nodes, erase, is_read_by_code, written_through

UNREAD = "which no captured pass reads"
"""Why the inputs of a tensor stay whole if only code that was not captured reads the tensor."""

_FOLD_LIMIT = 1 << 20
"""Largest constant that is computed while tracing. [elements]"""


@dataclass(frozen=True)
class Tensor:
    """A parameter, buffer or constant of a program, with the labels of its axes."""

    name: str
    node: fx.Node
    is_parameter: bool
    axes: tuple[Labels, ...]


@dataclass(frozen=True, eq=False)
class _Place:
    """An operator that ties labels. Deep copies of labels refer to the same operator, not to a copy."""

    node: fx.Node

    def __deepcopy__(self, _: Any) -> _Place:
        return self


def walk(
    program: ExportedProgram,
    *others: ExportedProgram,
    resized: Mapping[fx.Node, Any] | None = None,
    head_sizes: bool = False,
) -> tuple[Walk, list[Tensor], list[Walk]]:
    """Label every tensor of a program, and learn from the rules which labels belong together.

    If the first walk meets splits that labels do not decide, a second walk follows.

    Operators whose results nothing reads still tie labels: the model's own code runs them, and would fail
    if their sizes did not fit. They neither freeze nor mix, since they change no result. In the end they are
    removed from the programs.

    Args:
        program: The captured program.
        others: Captures of the same model at another size, in training mode, or of another method. They
            share the parameters, so what may be removed may be removed in all of them.
        resized: What each operator of the program gives at another size. If given, the program is walked
            with these sizes too.
        head_sizes: Whether the dimensions of attention heads carry units, in place of the heads.

    Returns:
        What the rules said about the program; its tensors, where tied ones appear once, under their first
        name; and what the rules said about each of the others.
    """
    state, tensors = _propagate(program, Walk(None, head_sizes=head_sizes), {})
    if state.splits or state.unmerged or state.matched:
        choices, sized = decide(state)
        state, tensors = _propagate(program, Walk(choices, head_sizes=head_sizes, sized=sized), {})
    walks = [walk_into(other, state.for_other_program(), program, tensors) for other in others]
    if resized is not None:
        with _with_values(program, resized):
            walk_into(program, state.for_other_program(), program, tensors)
    for captured, found in ((program, state), *zip(others, walks, strict=True)):
        dead = dead_nodes(captured.graph)
        found.values = {node: value for node, value in found.values.items() if node not in dead}
        erase(captured.graph_module, dead)
    return state, tensors, walks


@contextmanager
def _with_values(program: ExportedProgram, values: Mapping[fx.Node, Any]) -> Iterator[None]:
    """Inside, the nodes of a program have other recorded values."""
    before = {node: node.meta["val"] for node in program.graph.nodes if "val" in node.meta}
    try:
        for node in before:
            node.meta["val"] = values[node]
        yield
    finally:
        for node, value in before.items():
            node.meta["val"] = value


def walk_into(
    other: ExportedProgram, state: Walk, program: ExportedProgram, tensors: Iterable[Tensor]
) -> Walk:
    """Walk over another program of a model. Parameters have the labels that they have in `program`."""
    return _propagate(other, state, {id(tensor_of(program, t.name)): t for t in tensors})[0]


def _propagate(
    program: ExportedProgram, state: Walk, tensors: dict[int, Tensor]
) -> tuple[Walk, list[Tensor]]:
    """Walk over a program once; `state` takes what the rules say.

    `tensors` are those labelled in an earlier walk, by identity.
    """
    dead = dead_nodes(program.graph)
    state.written = written_through(program.graph)
    for node, kind, target in lifted(program):
        if kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR) and target is not None:
            tensor = tensor_of(program, target)
            labelled = tensors.get(id(tensor))
            if labelled is None:
                axes = tuple(
                    state.store.fresh(n, of_parameter=True) if n > 1 else np.zeros(n, np.int64)
                    for n in shape_of(node)
                )
                is_parameter = kind is InputKind.PARAMETER
                labelled = tensors[id(tensor)] = Tensor(target, node, is_parameter, axes)
            state.values[node] = labelled.axes
            state.names[node] = labelled.name
            if kind is not InputKind.PARAMETER:
                state.constants[node] = tensor
            state.weights.add_parameter(node)
        elif isinstance(node.meta.get("val"), torch.Tensor):
            label = state.reasons.label(Reason(f"model input {node.name}"))
            state.values[node] = _filled(node.meta["val"], label)
        else:
            state.values[node] = None
    for node in program.graph.nodes:
        if node.op == "call_function":
            with state.store.at(_Place(node)), state.store.muted() if node in dead else nullcontext():
                state.values[node] = _visit(node, state)
            inputs = [n for n in node.all_input_nodes if state.values.get(n) is not None]
            state.weights.add_call(node, inputs)
            _fold(node, state)
        elif node.op == "output":
            because = state.reasons.label(Reason("model output"))
            for source in node.all_input_nodes:
                _freeze(state.values[source], because, state)
        elif node.op == "get_attr":
            state.values[node] = None
    state.produced = [p for p in state.produced if p.node not in dead]
    names = {node.name for node in dead}
    state.contractions = [c for c in state.contractions if c.node not in names]
    return state, list(tensors.values())


def _visit(node: fx.Node, state: Walk) -> Value:
    """Return the labels of a node's output. An operator that no rule can follow freezes its inputs."""
    if is_read_by_code(node):
        return _unknown(node, Reason("values that decide how its code goes on", where(node)), state)
    value = node.meta.get("val")
    tensors = [n for n in node.all_input_nodes if state.values.get(n) is not None]
    if not _holds_tensor(value) and (not tensors or only_asks(node)):
        return None
    found = find_rule(node)
    if found is None:
        return _unknown(node, Reason(f"no rule for {operator_name(node)}", where(node)), state)
    try:
        result = found(Op(node, state))
        _check(result, value)
    except Exception as error:  # a rule that fails freezes its inputs: less is pruned, but nothing wrongly
        reason = Reason(f"the rule for {operator_name(node)} cannot follow this call: {error}", where(node))
        return _unknown(node, reason, state)
    return result


def _fold(node: fx.Node, state: Walk) -> None:
    """Compute integers that depend on constants alone, since an index may be a view or a copy of one."""
    value, target = node.meta.get("val"), node.target
    inputs = node.all_input_nodes
    if (
        not isinstance(value, torch.Tensor)
        or not isinstance(target, torch._ops.OpOverload)
        or value.is_floating_point()
        or any(isinstance(size, torch.SymInt) for size in value.shape)
        or value.numel() > _FOLD_LIMIT
        or not inputs
        or any(n not in state.constants or state.constants[n].is_meta for n in inputs)
        or torch.Tag.nondeterministic_seeded in target.tags
        or (target._schema.is_mutable and operator_name(node) != "aten.detach_.default")
    ):
        return
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), state.constants.__getitem__)
    state.constants[node] = target(*args, **kwargs)


def _unknown(node: fx.Node, reason: Reason, state: Walk) -> Value:
    because = state.reasons.label(reason)
    for source in node.all_input_nodes:
        _freeze(state.values.get(source), because, state)
    return _filled(node.meta.get("val"), because)


def _freeze(value: Value, because: int, state: Walk) -> None:
    if isinstance(value, tuple):
        for axis in value:
            state.store.freeze(axis, because)
    elif isinstance(value, list):
        for item in value:
            _freeze(item, because, state)


def _filled(value: Any, label: int) -> Value:
    """Give all positions of a value one label. Axes of size 1 hold no units."""
    if isinstance(value, torch.Tensor):
        try:
            shape = shape_of(value)
        except ValueError:  # a size that depends on the data
            shape = tuple(
                2 if isinstance(s, torch.SymInt) and s.node.hint is None else int(s) for s in value.shape
            )
        return tuple(np.full(n, label if n > 1 else 0, dtype=np.int64) for n in shape)
    if isinstance(value, list | tuple):
        return [_filled(v, label) for v in value]
    if isinstance(value, Mapping):
        return [_filled(v, label) for v in value.values()]
    return None


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(_holds_tensor(v) for v in value)
    return isinstance(value, torch.Tensor)


def _check(result: Value, value: Any) -> None:
    """Raise ValueError unless a rule returned a label for each position of the captured value."""
    if isinstance(value, torch.Tensor):
        if not isinstance(result, tuple) or tuple(map(len, result)) != shape_of(value):
            got = tuple(map(len, result)) if isinstance(result, tuple) else type(result).__name__
            raise ValueError(f"expected labels of shape {shape_of(value)}, got {got}")
    elif isinstance(value, list | tuple):
        if not isinstance(result, list) or len(result) != len(value):
            raise ValueError(f"expected labels of {len(value)} outputs, got {type(result).__name__}")
        for r, v in zip(result, value, strict=True):
            if isinstance(v, torch.Tensor) and r is not None:
                _check(r, v)


def keep_inputs_of(unread: Sequence[str], walk: Walk, tensors: list[Tensor]) -> None:
    """Freeze whatever may be an input of tensors that no captured pass reads.

    Which units these tensors read is unknown. So every axis that is as long as one of their axes is frozen.
    """
    names = set(unread)
    sizes: dict[int, str] = {}
    for tensor in tensors:
        if tensor.name in names:
            for axis in tensor.axes:
                sizes.setdefault(len(axis), tensor.name)
    for tensor in tensors:
        for axis in tensor.axes if tensor.name not in names else ():
            name = sizes.get(len(axis))
            if name is not None and len(axis) > 1:
                what = f"may feed {name}, {UNREAD}"
                walk.store.freeze(axis, walk.reasons.label(Reason(what)))
