"""The captured programs of one model. Inputs of new sizes may need a further program."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

from secateur.calibration.randomness import seeded
from secateur.common.models import device_of, evaluating
from secateur.common.outputs import agree, tensors_of
from secateur.errors import CalibrationError, CaptureError
from secateur.graph.branches import capture_branches
from secateur.graph.datasizes import arguments_of, measure_sizes
from secateur.graph.inline import Interpreter
from secateur.graph.knownvalues import is_countable
from secateur.graph.leaf import Place
from secateur.graph.nodes import hint, is_open, lifted
from secateur.graph.writes import dead_nodes, erase

MOST = 64
"""The most programs of one model. If its code has sizes as numbers, it needs one for each size."""


class Programs:
    """The first captured program, and further ones, which are captured when inputs need them.

    Where the sizes of inputs differ along an axis, the program is captured so that this axis may have any
    size. A forward pass may still do something else at a new size, so the outputs of the program are compared
    with those of the model there. If they differ, or the axis cannot be left open, each size gets a program
    of its own.
    """

    def __init__(
        self,
        program: ExportedProgram,
        model: nn.Module | None = None,
        values: Mapping[int, Tensor] | None = None,
    ) -> None:
        """Start with one program.

        Args:
            program: What was captured first.
            model: The model it was captured from. Without it, no further program can be captured.
            values: The inputs for whose values alone this program is right, by their numbers.
        """
        self.model = model
        self._values = {id(program): values or {}}
        self._all = [program]
        self._chosen: dict[Any, ExportedProgram] = {}

    def __len__(self) -> int:
        """How many programs there are so far."""
        return len(self._all)

    @property
    def first(self) -> ExportedProgram:
        """The program that was captured first."""
        return self._all[0]

    def first_is_right(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether the first program is right for these arguments."""
        try:
            leaves = leaves_of(self.first, args, kwargs)
        except CalibrationError:
            return False
        return self._is_trusted(self.first, leaves)

    def of(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ExportedProgram:
        """Return the program for these arguments; it is captured if there is none yet.

        Raises:
            CalibrationError: No program can be captured for them, or there are too many programs.
        """
        key = _kind(args, kwargs)
        if any(self._values.values()):
            leaves = pytree.tree_leaves((args, dict(kwargs)))
            key = repr((key, [v.tolist() for v in leaves if is_countable(v)]))
        if key not in self._chosen:
            self._chosen[key] = self._find(args, kwargs)
        return self._chosen[key]

    def _find(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ExportedProgram:
        """Return the first program that is right for these arguments, or capture one."""
        wrong: CalibrationError | None = None
        for program in self._all:
            try:
                leaves = leaves_of(program, args, kwargs)
            except CalibrationError as error:
                wrong = wrong or error
                continue
            if self._is_trusted(program, leaves) or self._agrees(program, leaves):
                return program
        if self.model is None and wrong is not None:
            raise wrong
        if len(self._all) >= MOST:
            raise CalibrationError(
                f"batches: expected inputs of at most {MOST} sizes, since the model is captured once for "
                "each, got more. Pad or crop to a few sizes: multiples of 32, for example."
            ) from wrong
        return self._capture(args, kwargs, wrong)

    def _capture(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], wrong: CalibrationError | None
    ) -> ExportedProgram:
        """Capture a program for these arguments, if possible with any size along the axes that differ."""
        if self.model is None:
            raise CalibrationError("batches: expected inputs of the traced sizes, got others.")
        place = device_of(self.model)  # data may be elsewhere: see `compute_on`
        args, kwargs = pytree.tree_map_only(Tensor, lambda tensor: tensor.to(place), (args, dict(kwargs)))
        for also in (self._differing(args, kwargs), ()):
            try:
                captured = capture_branches(self.model, args, kwargs, also=also)[0]
            except CaptureError as error:
                if wrong is None:
                    raise
                raise wrong from error
            program = captured.program
            self._values[id(program)] = captured.values
            measure_sizes(program)
            erase(program.graph_module, dead_nodes(program.graph))
            try:
                leaves = leaves_of(program, args, kwargs)
            except CalibrationError:  # a batch of one, captured as two, and the program is for two only
                continue
            if not also or self._is_trusted(program, leaves) or self._agrees(program, leaves):
                break
        self._all.append(program)
        return program

    def _differing(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Place]:
        """Return the axes in which these arguments differ from those of all programs. Tensors are numbered.

        An input that no program has, such as labels, differs in each axis that is as long as one of these.
        """
        captured = [shapes_of(program) for program in self._all]
        named = [(k, v) for k, v in _paths((args, dict(kwargs))).items() if isinstance(v, Tensor)]
        found = [
            (str(number), axis)
            for number, (name, tensor) in enumerate(named)
            for axis, size in enumerate(tensor.shape)
            if any(
                len(shape) == tensor.ndim and shape[axis] not in (None, size)
                for shapes in captured
                if (shape := shapes.get(name)) is not None
            )
        ]
        sizes = {named[int(number)][1].shape[axis] for number, axis in found}
        found += [
            (str(number), axis)
            for number, (name, tensor) in enumerate(named)
            if all(name not in shapes for shapes in captured)
            for axis, size in enumerate(tensor.shape)
            if size in sizes and size > 1
        ]
        return found

    def _is_trusted(self, program: ExportedProgram, leaves: list[Any]) -> bool:
        """Whether a program is sure to be right for these leaves: for their sizes, and its fixed values."""
        fixed = self._values[id(program)].items()
        return all(torch.equal(leaves[k], v.to(leaves[k].device)) for k, v in fixed) and is_trusted(
            program, leaves
        )

    def _agrees(self, program: ExportedProgram, leaves: list[Any]) -> bool:
        """Whether a program and the model give the same."""
        return self.model is None or values_at(program, self.model, leaves) is not None


@torch.no_grad()
def values_at(program: ExportedProgram, model: nn.Module, leaves: list[Any]) -> dict[fx.Node, Any] | None:
    """Run a program at other sizes and return what each node gives, as tensors on the meta device.

    Args:
        program: The captured program. It may contain sizes of its capture.
        model: What it was captured from.
        leaves: The leaves of the arguments, in the program's order.

    Returns:
        What each node gives; None if the program does not compute what the model does.
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
    """Keeps what each node gives, without the values."""

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
    """Whether the capture itself proves that a program is right at these sizes.

    It does not where the forward pass asked for a size, nor at sizes of one, which broadcast. PyTorch up to
    2.8 does not tell what was asked. There, only another batch size is trusted.
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
    """Return the placeholders of a program's inputs."""
    return [node for node, kind, _ in lifted(program) if kind is InputKind.USER_INPUT]


def open_places(program: ExportedProgram) -> frozenset[Place]:
    """Return the axes of a program's tensor inputs that may have any size. Tensors are numbered."""
    values = (node.meta.get("val") for node in inputs_of(program))
    tensors = (value for value in values if isinstance(value, Tensor))
    return frozenset(
        (str(number), axis)
        for number, value in enumerate(tensors)
        for axis, size in enumerate(value.shape)
        if is_open(size)
    )


def batch_axes(program: ExportedProgram, node: fx.Node) -> tuple[int, ...]:
    """Return the axes of a node's output whose size depends on the batch size; none where that is fixed."""
    value = node.meta.get("val")
    batch = symbols_of(next((n.meta.get("val") for n in inputs_of(program)), None), 0)
    axes = range(value.ndim) if isinstance(value, Tensor) else ()
    return tuple(axis for axis in axes if symbols_of(value, axis) & batch)


def symbols_of(value: Any, axis: int) -> set[Any]:
    """Return the symbols in the size of one axis of a captured tensor."""
    if not isinstance(value, Tensor) or not value.ndim:
        return set()
    size: Any = value.shape[axis]
    return set(size.node.expr.free_symbols) if is_open(size) else set()


def shapes_of(program: ExportedProgram) -> dict[str, tuple[int | None, ...]]:
    """Return the shape of each input, by its path in the arguments. An axis of any size is None."""
    arguments = pytree.tree_unflatten(inputs_of(program), program.call_spec.in_spec)
    return {
        path: tuple(None if is_open(n) else hint(n) for n in value.shape)
        for path, node in _paths(arguments).items()
        if isinstance(value := node.meta.get("val"), Tensor)
    }


def leaves_of(program: ExportedProgram, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """Flatten arguments to the leaves that a program takes, and check them.

    Raises:
        CalibrationError: Their structure, types or shapes are not those of the capture.
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
    """Return what the choice of a program depends on: structure, shapes, types, values of non-tensors."""
    leaves, spec = pytree.tree_flatten((args, dict(kwargs)))
    return str(spec), tuple(
        (tuple(v.shape), v.dtype) if isinstance(v, Tensor) else repr(v)[:200] for v in leaves
    )


def _paths(arguments: Any) -> dict[str, Any]:
    """Return the leaves of arguments by their paths."""
    return {pytree.keystr(path): leaf for path, leaf in pytree.tree_flatten_with_path(arguments)[0]}


def _has_hint(size: Any) -> bool:
    return not isinstance(size, torch.SymInt) or size.node.hint is not None


def _layout(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    parts = [f"{len(args)} positional"] if args or not kwargs else []
    if kwargs:
        parts.append("keywords " + ", ".join(kwargs))
    return " and ".join(parts)


def _check_leaf(node: fx.Node, leaf: Any, sizes: dict[Any, int]) -> None:
    """Raise CalibrationError if a program does not take a leaf.

    `sizes` has the size of each symbol so far, and is extended.
    """
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
