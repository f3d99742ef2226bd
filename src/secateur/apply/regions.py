"""Parts of a module that run as captured, where their own code cannot express smaller sizes.

``x.reshape(B, N, C)`` with C read off the input, or an assertion on ``embed_dim``: no attribute makes such
code take fewer heads. The submodule that holds it is then captured alone, with the arguments it gets inside
the model, and its sliced program takes its place. Around it the model keeps its classes, and inside it the
tensors keep their names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.utils import _pytree as pytree

from secateur.apply.compare import run
from secateur.apply.constants import Constants
from secateur.apply.program import Program, build_program
from secateur.apply.sizes import running_modules
from secateur.errors import ApplyError, CaptureError
from secateur.graph.capture import capture
from secateur.graph.graph import Graph
from secateur.graph.inputs import batch_size, samples_of
from secateur.graph.rules.op import Walk, is_open
from secateur.graph.walk import lifted, tensor_of
from secateur.plan import Plan

Arguments = tuple[tuple[Any, ...], dict[str, Any]]

_ATTRIBUTES = "secateur_attributes"


class Region(Program):
    """The sliced program of a submodule in that submodule's place.

    Plain attributes of the submodule can still be read: the code around it may ask for them.
    """

    def __getattr__(self, name: str) -> Any:
        """A tensor or submodule, else what the replaced submodule had."""
        attributes = self.__dict__.get("meta", {}).get(_ATTRIBUTES, {})
        if name in attributes:
            return attributes[name]
        return super().__getattr__(name)


class Regions:
    """Captured submodules of one model; of those that differ in their weights alone one is captured.

    Args:
        model: The dense model; it is left as it was.
        args: Positional arguments of the model.
        kwargs: Keyword arguments.
    """

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.model = model
        self._arguments: Arguments = (args, dict(kwargs))
        self._captured: dict[str, ExportedProgram | ApplyError] = {}
        self._by_kind: dict[str, ExportedProgram | ApplyError] = {}

    def put(self, small: nn.Module, paths: Iterable[str], graph: Graph, plan: Plan) -> None:
        """Replace submodules of a smaller model by their sliced programs, in place.

        Args:
            small: The smaller model.
            paths: Which submodules.
            graph: The trace of the dense model.
            plan: What went.

        Raises:
            ApplyError: If one cannot be captured alone, or its program cannot follow the plan.
        """
        paths = sorted(paths)
        self._capture([path for path in paths if path not in self._captured])
        for path in paths:
            found = self._captured[path]
            if isinstance(found, ApplyError):
                raise found
            replaced = small.get_submodule(path)
            region = self._sliced(path, found, graph, plan)
            region.meta[_ATTRIBUTES] = {k: v for k, v in vars(replaced).items() if _is_plain(k, v)}
            region.train(replaced.training)
            parent, _, leaf = path.rpartition(".")
            holder = small.get_submodule(parent)
            holder._modules[leaf] = region

    def _capture(self, paths: list[str]) -> None:
        if not paths:
            return
        given = self._arguments
        first = _one_more(given) if batch_size(given) == 1 else given  # one would be captured as a constant
        try:
            calls, longer = (_calls(self.model, paths, a) for a in (first, _one_more(first)))
        except Exception:  # a model may take one batch size only
            calls = longer = _calls(self.model, paths, given)
        for path in paths:
            kind = _kind(self.model.get_submodule(path), calls[path])
            if kind not in self._by_kind:
                try:
                    self._by_kind[kind] = self._alone(path, calls[path], longer[path], batch_size(first))
                except (ApplyError, CaptureError) as error:
                    self._by_kind[kind] = ApplyError(f"apply: submodule {path}: {error}")
            self._captured[path] = self._by_kind[kind]

    def _alone(
        self, path: str, calls: list[Arguments], longer: list[Arguments], samples: int
    ) -> ExportedProgram:
        described = {_described(call) for call in calls}
        if len(described) != 1 or len(calls) != len(longer):
            raise ApplyError(f"expected calls with arguments of one shape, got {len(described)} shapes.")
        args, kwargs = calls[0]
        open_axes = _open_axes(calls[0], longer[0], samples)
        for batch in (Dim("batch", min=1), Dim.AUTO):
            shapes = ShapesCollection()
            for leaf, axes in {id(leaf): (leaf, axes) for leaf, axes in open_axes}.values():
                shapes[leaf] = {k: _times(n, batch) for k, n in axes.items()}
            program, _, _ = capture(self.model.get_submodule(path), args, kwargs, shapes)
            if _count_open(program) == sum(len(axes) for _, axes in open_axes):
                return program
        raise ApplyError("expected it to take any batch size when captured alone, got a fixed one.")

    def _sliced(self, path: str, program: ExportedProgram, graph: Graph, plan: Plan) -> Region:
        submodule = self.model.get_submodule(path)
        slots = graph.keep_slots(plan.keep)
        labelled = _labelled(path, submodule, program, graph)
        constants = Constants(labelled, lambda labels: graph.kept_along(labels, slots))
        sliced = build_program(submodule, program, constants)
        return Region(sliced, sliced.graph, class_name=type(submodule).__name__)


def _labelled(path: str, submodule: nn.Module, program: ExportedProgram, graph: Graph) -> Walk:
    """The labels of a submodule's program: those of its part of the whole program, operator by operator.

    Raises:
        ApplyError: If the two do not run the same operators.
    """
    whole, part = _operators(graph.program, path), _operators(program)
    whole = whole[: len(part)]  # of several calls the first
    if [n.target for n in whole] != [n.target for n in part]:
        raise ApplyError(f"apply: expected submodule {path} to run the same operators when captured alone.")
    pairs = list(zip(part, whole, strict=True))
    for ours, theirs in zip(part, whole, strict=True):
        arguments = zip(*(pytree.tree_leaves((n.args, n.kwargs)) for n in (ours, theirs)), strict=False)
        pairs += [(a, b) for a, b in arguments if isinstance(a, fx.Node) and isinstance(b, fx.Node)]
    own = {id(tensor_of(graph.program, t.name)): t.node for t in graph.tensors}
    held = dict(submodule.named_parameters(remove_duplicate=False)) | dict(submodule.named_buffers())
    for node, _, name in lifted(program):
        if (known := own.get(id(held.get(name or "")))) is not None:
            pairs.append((node, known))  # also those that nothing reads
    found = Walk()
    for ours, theirs in pairs:
        found.values[ours] = graph.walk.values[theirs]
        if theirs in graph.walk.constants:
            found.constants[ours] = graph.walk.constants[theirs]
    return found


def _operators(program: ExportedProgram, path: str = "") -> list[fx.Node]:
    """The calls that yield tensors, in a submodule or everywhere."""
    return [
        node
        for node in program.graph.nodes
        if node.op == "call_function"
        and any(isinstance(v, torch.Tensor) for v in pytree.tree_leaves(node.meta.get("val")))
        and (not path or path in running_modules(node))
    ]


def _calls(model: nn.Module, paths: list[str], arguments: Arguments) -> dict[str, list[Arguments]]:
    """What each submodule is called with when the model runs."""
    found: dict[str, list[Arguments]] = {path: [] for path in paths}

    def remember(path: str) -> Callable[..., None]:
        return lambda module, args, kwargs: found[path].append((args, kwargs))

    hooks = [
        model.get_submodule(path).register_forward_pre_hook(remember(path), with_kwargs=True)
        for path in paths
    ]
    try:
        run(model, *arguments)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _one_more(arguments: Arguments) -> Arguments:
    """The same arguments with one sample more."""
    return samples_of(arguments, [*range(batch_size(arguments)), 0])


def _open_axes(call: Arguments, longer: Arguments, samples: int) -> list[tuple[torch.Tensor, dict[int, int]]]:
    """The axes of a call's tensors that follow the number of samples, and how many times that each is.

    A tensor that is passed twice is there twice.
    """
    found = []
    for ours, theirs in zip(pytree.tree_leaves(call), pytree.tree_leaves(longer), strict=True):
        if not isinstance(ours, torch.Tensor):
            if not isinstance(theirs, type(ours)) or (_is_plain("", ours) and ours != theirs):
                raise ApplyError(f"expected arguments that do not follow the batch, got {ours} and {theirs}.")
            continue
        axes = {k: m - n for k, (n, m) in enumerate(zip(ours.shape, theirs.shape, strict=True)) if n != m}
        if any(times < 1 or ours.shape[axis] != times * samples for axis, times in axes.items()):
            raise ApplyError("expected axes that are multiples of the batch, got others.")
        if axes:
            found.append((ours, axes))
    return found


def _times(count: int, batch: Any) -> Any:
    return count * batch if count > 1 and batch is not Dim.AUTO else batch


def _count_open(program: ExportedProgram) -> int:
    """How many axes of the program's inputs take any size."""
    inputs = set(program.graph_signature.user_inputs)
    values = [n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder" and n.name in inputs]
    return sum(is_open(size) for v in values if isinstance(v, torch.Tensor) for size in v.shape)


def _kind(submodule: nn.Module, calls: list[Arguments]) -> str:
    """Equal for submodules of the same classes, attributes and shapes, called alike."""
    lines = [_described(call) for call in calls]
    for name, module in submodule.named_modules():
        held = {k: v for k, v in vars(module).items() if k not in _BASE and k != "training"}
        lines.append(f"{name} {type(module)} { ({k: _text(v) for k, v in held.items()}) }")
        lines += [f"{k} {tuple(t.shape)} {t.dtype}" for k, t in _own_tensors(module)]
    return "\n".join(lines)


_BASE = frozenset(vars(nn.Module()))
"""What every module holds."""


def _text(value: Any) -> str:
    return repr(value) if _is_plain("", value) or isinstance(value, list | tuple) else f"object {id(value)}"


def _own_tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]


def _described(call: Arguments) -> str:
    leaves, structure = pytree.tree_flatten(call)
    shapes = [tuple(v.shape) if isinstance(v, torch.Tensor) else v for v in leaves]
    return f"{structure} {shapes}"


def _is_plain(name: str, value: Any) -> bool:
    return name != "training" and (value is None or isinstance(value, bool | int | float | str))
