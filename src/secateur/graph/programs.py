"""The captured programs of one model: another one for inputs of sizes that the first does not take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

from secateur.calibration.randomness import seeded
from secateur.common.models import evaluating
from secateur.common.outputs import agree, tensors_of
from secateur.errors import CalibrationError, CaptureError
from secateur.graph.capture import capture
from secateur.graph.datasizes import arguments_of, measure_sizes
from secateur.graph.inline import Interpreter
from secateur.graph.leaf import Place
from secateur.graph.nodes import hint, is_open, lifted
from secateur.graph.writes import dead_nodes, erase

MOST = 64
"""So many programs are kept; a model whose code holds each size needs one for each."""


class Programs:
    """The captured program, and those of other sizes, each captured when it is first asked for.

    An axis in which inputs differ is captured as one of any size. Whether that program is right at a new size
    is not taken on trust, since a forward pass may go another way there: its outputs are compared with the
    model's. Where it is not, or the axis cannot be left open, there is a program for each size.
    """

    def __init__(self, program: ExportedProgram, model: nn.Module | None = None) -> None:
        """Begin with one program.

        Args:
            program: What was captured first.
            model: What it was captured from; without it there is no other program.
        """
        self.model = model
        self._all = [program]
        self._chosen: dict[Any, ExportedProgram] = {}

    def __len__(self) -> int:
        """How many there are so far."""
        return len(self._all)

    @property
    def first(self) -> ExportedProgram:
        """What was captured first."""
        return self._all[0]

    def begins_with(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether the first program takes these arguments."""
        try:
            leaves = leaves_of(self.first, args, kwargs)
        except CalibrationError:
            return False
        return is_trusted(self.first, leaves)

    def of(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ExportedProgram:
        """The program that takes these arguments.

        Raises:
            CalibrationError: There is none, and none can be captured; or there are too many.
        """
        key = _kind(args, kwargs)
        if key not in self._chosen:
            self._chosen[key] = self._find(args, kwargs)
        return self._chosen[key]

    def _find(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ExportedProgram:
        wrong: CalibrationError | None = None
        for program in self._all:
            try:
                leaves = leaves_of(program, args, kwargs)
            except CalibrationError as error:
                wrong = wrong or error
                continue
            if is_trusted(program, leaves) or self._agrees(program, leaves):
                return program
        if self.model is None and wrong is not None:
            raise wrong
        if len(self._all) >= MOST:
            raise CalibrationError(
                f"batches: expected inputs of at most {MOST} sizes, since the model's code holds each, got "
                "more. Pad or crop to a few sizes: multiples of 32, for example."
            ) from wrong
        return self._capture(args, kwargs, wrong)

    def _capture(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], wrong: CalibrationError | None
    ) -> ExportedProgram:
        """A program for these arguments, of any size in the axes that differ, if that can be."""
        if self.model is None:
            raise CalibrationError("batches: expected inputs of the traced sizes, got others.")
        for also in (self._differing(args, kwargs), ()):
            try:
                program = capture(self.model, args, kwargs, also=also)[0]
            except CaptureError as error:
                if wrong is None:
                    raise
                raise wrong from error
            measure_sizes(program)
            erase(program.graph_module, dead_nodes(program.graph))
            try:
                leaves = leaves_of(program, args, kwargs)
            except CalibrationError:  # a batch of one, captured as two, in a model that holds that number
                continue
            if not also or is_trusted(program, leaves) or self._agrees(program, leaves):
                break
        self._all.append(program)
        return program

    def _differing(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Place]:
        """The axes in which arguments differ from those of programs that are known, tensors by number.

        Inputs that no program has yet, such as labels, follow where an axis is as long as one of these.
        """
        known = [shapes_of(program) for program in self._all]
        named = [(k, v) for k, v in _paths((args, dict(kwargs))).items() if isinstance(v, Tensor)]
        found = [
            (str(number), axis)
            for number, (name, tensor) in enumerate(named)
            for axis, size in enumerate(tensor.shape)
            if any(
                len(shape) == tensor.ndim and shape[axis] not in (None, size)
                for shapes in known
                if (shape := shapes.get(name)) is not None
            )
        ]
        sizes = {named[int(number)][1].shape[axis] for number, axis in found}
        found += [
            (str(number), axis)
            for number, (name, tensor) in enumerate(named)
            if all(name not in shapes for shapes in known)
            for axis, size in enumerate(tensor.shape)
            if size in sizes and size > 1
        ]
        return found

    def _agrees(self, program: ExportedProgram, leaves: list[Any]) -> bool:
        """Whether a program gives what the model does."""
        return self.model is None or values_at(program, self.model, leaves) is not None


@torch.no_grad()
def values_at(program: ExportedProgram, model: nn.Module, leaves: list[Any]) -> dict[fx.Node, Any] | None:
    """What each operator of a program gives at other sizes, without the numbers (on the meta device).

    Args:
        program: The captured program, which may hold sizes of its capture.
        model: What it was captured from.
        leaves: The leaves of the arguments, in the program's order.

    Returns:
        By node what it gives; None if the program does not compute there what the model does.
    """
    args, kwargs = pytree.tree_unflatten(leaves, program.call_spec.in_spec)
    own = [v.clone() if isinstance(v, Tensor) else v for v in leaves]
    running = _Recording(program.graph_module)
    try:
        with seeded(0), evaluating(model):
            wanted = tensors_of(model(*args, **kwargs))
        with seeded(0):
            outputs = running.run(*arguments_of(program, own))
    except Exception:  # the user's own forward, or an operator that has other sizes in it
        return None
    specs = program.graph_signature.output_specs
    given = tensors_of([v for v, s in zip(outputs, specs, strict=True) if s.kind is OutputKind.USER_OUTPUT])
    return running.values if agree(given, wanted) else None


class _Recording(Interpreter):
    """Keeps what each node gives, without the numbers."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.values[n] = pytree.tree_map(_on_meta, value)
        return value


def _on_meta(value: Any) -> Any:
    return torch.empty_like(value, device="meta") if isinstance(value, Tensor) else value


def is_trusted(program: ExportedProgram, leaves: list[Any]) -> bool:
    """Whether a program is right at these sizes as far as its capture says, so that nothing need be compared.

    Not where the forward pass asked for a size, nor at sizes of one, which broadcast. PyTorch up to 2.8 does
    not say what was asked: there the batch alone is taken on trust.
    """
    inputs = inputs_of(program)
    tensors = [(n.meta["val"], v) for n, v in zip(inputs, leaves, strict=True) if isinstance(v, Tensor)]
    places = [
        (axis, n, m) for e, v in tensors for axis, (n, m) in enumerate(zip(e.shape, v.shape, strict=True))
    ]
    if all(hint(n) == m for _, n, m in places if _has_hint(n)):
        return True
    if any(m < 2 for _, n, m in places if is_open(n)):
        return False
    only_batch = all(hint(n) == m for axis, n, m in places if axis)
    return not getattr(program, "_guards_code", not only_batch)


def inputs_of(program: ExportedProgram) -> list[fx.Node]:
    """The placeholders of the program's inputs."""
    return [node for node, kind, _ in lifted(program) if kind is InputKind.USER_INPUT]


def batch_axes(program: ExportedProgram, node: fx.Node) -> tuple[int, ...]:
    """The axes of a node's output whose length depends on that of the batch; none where that is fixed."""
    value = node.meta.get("val")
    batch = _symbols(next((n.meta.get("val") for n in inputs_of(program)), None), 0)
    axes = range(value.ndim) if isinstance(value, Tensor) else ()
    return tuple(axis for axis in axes if _symbols(value, axis) & batch)


def _symbols(value: Any, axis: int) -> set[Any]:
    """The symbols in one of a captured tensor's sizes."""
    if not isinstance(value, Tensor) or not value.ndim:
        return set()
    size: Any = value.shape[axis]
    return set(size.node.expr.free_symbols) if is_open(size) else set()


def shapes_of(program: ExportedProgram) -> dict[str, tuple[int | None, ...]]:
    """The shape of each input by its place in the arguments; None for an axis of any size."""
    arguments = pytree.tree_unflatten(inputs_of(program), program.call_spec.in_spec)
    return {
        path: tuple(None if is_open(n) else hint(n) for n in value.shape)
        for path, node in _paths(arguments).items()
        if isinstance(value := node.meta.get("val"), Tensor)
    }


def leaves_of(program: ExportedProgram, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """Arguments as the leaves that a program takes, checked against what it was captured with.

    Raises:
        CalibrationError: They are not of its shapes, types and structure.
    """
    inputs = inputs_of(program)
    in_spec = program.call_spec.in_spec
    captured_args, captured_kwargs = pytree.tree_unflatten([0] * in_spec.num_leaves, in_spec)
    names = [node.name for node in inputs]
    if set(kwargs) != set(captured_kwargs) and not args and set(kwargs) == set(names):
        # Captured with positional arguments, called with the same ones by name.
        leaves = [kwargs[name] for name in names]
    else:
        ordered = {k: kwargs[k] for k in captured_kwargs if k in kwargs}
        ordered |= {k: v for k, v in kwargs.items() if k not in captured_kwargs}
        leaves, spec = pytree.tree_flatten((tuple(args), ordered))
        if spec != in_spec:
            raise CalibrationError(
                f"model inputs: expected {_layout(captured_args, captured_kwargs)}, got "
                f"{_layout(tuple(args), kwargs)}. "
                "Pass batches of the structure of the example inputs."
            )
    sizes: dict[Any, int] = {}
    for node, leaf in zip(inputs, leaves, strict=True):
        _check_leaf(node, leaf, sizes)
    return leaves


def _kind(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What decides which program takes arguments: structure, shapes and types, and what is no tensor."""
    leaves, spec = pytree.tree_flatten((args, dict(kwargs)))
    return str(spec), tuple(
        (tuple(v.shape), v.dtype) if isinstance(v, Tensor) else repr(v)[:200] for v in leaves
    )


def _paths(arguments: Any) -> dict[str, Any]:
    """The leaves of arguments by where they are in these."""
    return {pytree.keystr(path): leaf for path, leaf in pytree.tree_flatten_with_path(arguments)[0]}


def _has_hint(size: Any) -> bool:
    return not isinstance(size, torch.SymInt) or size.node.hint is not None


def _layout(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    parts = [f"{len(args)} positional"] if args or not kwargs else []
    if kwargs:
        parts.append("keywords " + ", ".join(kwargs))
    return " and ".join(parts)


def _check_leaf(node: fx.Node, leaf: Any, sizes: dict[Any, int]) -> None:
    """Raise CalibrationError if a program does not take a leaf; `sizes` are those of its symbols so far."""
    expected = node.meta.get("val")
    if not isinstance(expected, Tensor):
        if "val" in node.meta and not isinstance(leaf, Tensor) and leaf != expected:
            raise CalibrationError(
                f"model input {node.name}: expected {expected!r}, which the program was captured with, got "
                f"{leaf!r}. Trace with the value that the batches hold."
            )
        return
    shape = [None if is_open(n) else hint(n) for n in expected.shape]
    described = "[" + ", ".join("any" if n is None else str(n) for n in shape) + "]"
    if not isinstance(leaf, Tensor):
        raise CalibrationError(
            f"model input {node.name}: expected a tensor {described}, got {type(leaf).__name__}. "
            "Pass batches of the structure of the example inputs."
        )
    if leaf.dtype != expected.dtype:
        raise CalibrationError(
            f"model input {node.name}: expected {expected.dtype}, got {leaf.dtype}. Convert the data, "
            "or trace with example inputs of that type."
        )
    fits = leaf.ndim == len(shape) and all(n in (None, m) for n, m in zip(shape, leaf.shape, strict=True))
    if not fits:
        raise CalibrationError(
            f"model input {node.name}: expected shape {described}, got {list(leaf.shape)}, which the model "
            "does not take. Pass samples of the shape that it was traced with, or trace with others."
        )
    for expression, size in zip(expected.shape, leaf.shape, strict=True):
        if is_open(expression) and sizes.setdefault(str(expression), size) != size:
            raise CalibrationError(
                f"model input {node.name}: expected sizes that agree with the other inputs', got "
                f"{list(leaf.shape)}. Check that the inputs belong together."
            )
