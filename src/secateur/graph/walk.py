"""The walk over a captured program: each operator's rule is asked once, in order."""

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
from secateur.graph.rules import Op, find_rule, operator_name
from secateur.graph.rules.op import Value, Walk
from secateur.graph.splits import decide
from secateur.graph.writes import dead_nodes, erase, written_through

_FOLD_LIMIT = 1 << 20
"""Largest constant that is computed while tracing. [elements]"""


@dataclass(frozen=True)
class Tensor:
    """A parameter, buffer or constant of the program, with the labels of its axes."""

    name: str
    node: fx.Node
    is_parameter: bool
    axes: tuple[Labels, ...]


@dataclass(frozen=True, eq=False)
class _Place:
    """An operator that ties labels; copies of the labels refer to it, since their copies need no program."""

    node: fx.Node

    def __deepcopy__(self, _: Any) -> _Place:
        return self


def walk(
    program: ExportedProgram, *others: ExportedProgram, resized: Mapping[fx.Node, Any] | None = None
) -> tuple[Walk, list[Tensor], list[Walk]]:
    """Propagate labels through the program, a second time if the first left splits to decide.

    Operators that nothing reads tie labels, since a model's own code runs them, but neither freeze nor mix;
    they are taken out of the programs.

    Args:
        program: The captured program.
        others: The same model captured at another size, in training mode, or by another method. Their
            operators tie the same parameters once more, so that what may be removed holds in all of them.
        resized: What each operator of the program gives at another size, if the program is right there too:
            a walk that holds at that size as well.

    Returns:
        What was learnt; the program's tensors, of which tied ones appear once, under their first name; and
        what was learnt of each of the others.
    """
    state, tensors = _propagate(program, Walk(None), {})
    if state.splits or state.unmerged:
        state, tensors = _propagate(program, Walk(decide(state)), {})

    def also() -> Walk:
        return Walk(state.choices or {}, store=state.store, reasons=state.reasons, roles=state.roles)

    learnt = [walk_into(other, also(), program, tensors) for other in others]
    if resized is not None:
        with _giving(program, resized):
            walk_into(program, also(), program, tensors)
    for captured, found in ((program, state), *zip(others, learnt, strict=True)):
        dead = dead_nodes(captured.graph)
        found.values = {node: value for node, value in found.values.items() if node not in dead}
        erase(captured.graph_module, dead)
    return state, tensors, learnt


@contextmanager
def _giving(program: ExportedProgram, values: Mapping[fx.Node, Any]) -> Iterator[None]:
    """Let the operators of a program be known to give other values for the moment."""
    known = {node: node.meta["val"] for node in program.graph.nodes if "val" in node.meta}
    try:
        for node in known:
            node.meta["val"] = values[node]
        yield
    finally:
        for node, value in known.items():
            node.meta["val"] = value


def walk_into(
    other: ExportedProgram, state: Walk, program: ExportedProgram, tensors: Iterable[Tensor]
) -> Walk:
    """Propagate labels through another program of the model, into the labels of the tensors of `program`."""
    return _propagate(other, state, {id(tensor_of(program, t.name)): t for t in tensors})[0]


def _propagate(
    program: ExportedProgram, state: Walk, tensors: dict[int, Tensor]
) -> tuple[Walk, list[Tensor]]:
    """One walk into `state`; `tensors` are those whose labels are known from an earlier one, by identity."""
    dead = dead_nodes(program.graph)
    state.written = written_through(program.graph)
    for node, kind, target in lifted(program):
        if kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR) and target is not None:
            tensor = tensor_of(program, target)
            known = tensors.get(id(tensor))
            if known is None:
                axes = tuple(
                    state.store.fresh(n, held=True) if n > 1 else np.zeros(n, np.int64)
                    for n in shape_of(node)
                )
                known = tensors[id(tensor)] = Tensor(target, node, kind is InputKind.PARAMETER, axes)
            state.values[node] = known.axes
            state.names[node] = known.name
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
    return state, list(tensors.values())


def _visit(node: fx.Node, state: Walk) -> Value:
    value = node.meta.get("val")
    tensors = [n for n in node.all_input_nodes if state.values.get(n) is not None]
    if not _holds_tensor(value) and (not tensors or _only_asks_for_shape(node)):
        return None
    found = find_rule(node)
    if found is None:
        return _unknown(node, Reason(f"no rule for {operator_name(node)}", where(node)), state)
    try:
        result = found(Op(node, state))
        _check(result, value)
    except Exception as error:  # a rule that cannot cope costs coverage, never correctness
        reason = Reason(f"the rule for {operator_name(node)} cannot follow this call: {error}", where(node))
        return _unknown(node, reason, state)
    return result


def _fold(node: fx.Node, state: Walk) -> None:
    """Know the value of integers computed from constants: an index may be one, behind a view or a copy."""
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


def _only_asks_for_shape(node: fx.Node) -> bool:
    name = operator_name(node)
    return name.startswith(("aten.sym_", "aten._assert", "aten.is_")) and "nonzero" not in name


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
    """Labels of a value's shape, all the same; singleton axes hold no units."""
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
    """A rule must return as many labels as the captured value has positions."""
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
    """Freeze what tensors may read that no captured pass reads: any axis that is as long as one of theirs."""
    left = set(unread)
    sizes: dict[int, str] = {}
    for tensor in tensors:
        if tensor.name in left:
            for axis in tensor.axes:
                sizes.setdefault(len(axis), tensor.name)
    for tensor in tensors:
        for axis in tensor.axes if tensor.name not in left else ():
            name = sizes.get(len(axis))
            if name is not None and len(axis) > 1:
                what = f"may feed {name}, which no captured pass reads"
                walk.store.freeze(axis, walk.reasons.label(Reason(what)))
