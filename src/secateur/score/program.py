"""Runs the captured program without touching the model it was captured from.

No hooks and no copies: the program's parameters are fed as detached aliases, which share the model's
storage but have gradients of their own, and whatever the program writes in place is fed as a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from secateur.errors import CalibrationError
from secateur.graph.inline import entered, modes_of
from secateur.graph.rules.op import is_open
from secateur.graph.writes import written

Read = Callable[[fx.Node], Any]
"""Gives the value of a node that the watched one reads."""

Watcher = Callable[[str, Tensor, Read], None]
"""Called with a node's name and value, right after the node was computed, and with a way to its inputs."""


class _Watching(fx.Interpreter):
    """Interprets the program's graph and shows the values of watched nodes."""

    def __init__(self, module: fx.GraphModule, cloned: frozenset[str]) -> None:
        super().__init__(module)
        self.extra_traceback = False  # it would append the node to every message, also to ours
        self.watched: Collection[str] = ()
        self.watcher: Watcher | None = None
        self._cloned = cloned

    def run_node(self, n: fx.Node) -> Any:
        with entered(modes_of(n)):
            value = super().run_node(n)
        if n.op == "placeholder" and n.name in self._cloned and isinstance(value, Tensor):
            return value.clone()
        if self.watcher is not None and n.name in self.watched:
            self.watcher(n.name, value, self.env.__getitem__)
        return value


class CapturedModel:
    """The captured program as something to call, with the model's own signature.

    Attributes:
        tensors: Aliases of parameters and buffers by state-dict name.
        parameters: Names of those that are parameters.
        writes: Whether the program writes into any of its values after they were computed.
    """

    def __init__(self, program: ExportedProgram, differentiable: Collection[str] = ()) -> None:
        """Prepare a run.

        Args:
            program: From `torch.export`.
            differentiable: State-dict names of the parameters to take gradients of.
        """
        signature = program.graph_signature
        module = program.graph_module
        # The same tensor under two names gets one alias, so that its gradients add up.
        aliases: dict[int, Tensor] = {}
        self.tensors: dict[str, Tensor] = {
            name: aliases.setdefault(id(tensor), tensor.detach())
            for name, tensor in program.state_dict.items()
        }
        self.parameters = frozenset(signature.parameters)
        for name in differentiable:
            self.tensors[name].requires_grad_()

        self._program = program
        self._lifted: list[Any] = []
        writes = written(module)
        self.writes = bool(writes)
        cloned: set[str] = set()
        placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
        self._inputs: list[fx.Node] = []
        for node, spec in zip(placeholders, signature.input_specs, strict=True):
            # Aliasing can be followed for what is written directly; for the rest, a program that writes
            # anything gets copies of all but its parameters.
            if node.name in writes or (writes and spec.kind is not InputKind.PARAMETER):
                cloned.add(node.name)
            if spec.kind is InputKind.USER_INPUT:
                self._inputs.append(node)
            elif spec.target in self.tensors:
                self._lifted.append(self.tensors[spec.target])
            else:
                constant = program.constants[spec.target or ""]
                self._lifted.append(constant.detach() if isinstance(constant, Tensor) else constant)
        self._outputs = [s.kind is OutputKind.USER_OUTPUT for s in signature.output_specs]
        self._interpreter = _Watching(module, frozenset(cloned))
        in_spec = program.call_spec.in_spec
        self._template = pytree.tree_unflatten([0] * in_spec.num_leaves, in_spec)

    @property
    def device(self) -> torch.device:
        """Where the parameters are; the CPU if there are none."""
        return next((t.device for t in self.tensors.values()), torch.device("cpu"))

    def open_axes(self, node_name: str) -> tuple[int, ...]:
        """The axes of a node's output whose length the program leaves open."""
        for node in self._program.graph.nodes:
            if node.name == node_name:
                return _open_axes(node)
        return ()

    def watch(self, nodes: Collection[str], watcher: Watcher | None) -> None:
        """Show the values of these nodes to `watcher` in the calls that follow; None stops it."""
        self._interpreter.watched = frozenset(nodes)
        self._interpreter.watcher = watcher

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program and return what the model would.

        Raises:
            CalibrationError: The arguments are not of the shapes, types and structure it was captured with.
        """
        leaves = self.leaves(args, kwargs)
        try:
            outputs = self._interpreter.run(*self._lifted, *leaves)
        finally:
            # The interpreter would keep the last values, and with them the autograd graph, alive.
            self._interpreter.env = {}
        given = [value for value, is_user in zip(outputs, self._outputs, strict=True) if is_user]
        return pytree.tree_unflatten(given, self._program.call_spec.out_spec)

    def leaves(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        """Arguments as the leaves that the program takes, checked against what it was captured with."""
        captured_args, captured_kwargs = self._template
        names = [node.name for node in self._inputs]
        kwargs = dict(kwargs)
        if "labels" not in captured_kwargs and "labels" not in names:
            kwargs.pop("labels", None)  # a mapping batch holds them for the loss alone
        if set(kwargs) != set(captured_kwargs) and not args and set(kwargs) == set(names):
            # Captured with positional arguments, called with the same ones by name.
            leaves = [kwargs[name] for name in names]
        else:
            ordered = {k: kwargs[k] for k in captured_kwargs if k in kwargs}
            ordered |= {k: v for k, v in kwargs.items() if k not in captured_kwargs}
            leaves, spec = pytree.tree_flatten((tuple(args), ordered))
            if spec != self._program.call_spec.in_spec:
                raise CalibrationError(
                    f"model inputs: expected {_outline(captured_args, captured_kwargs)}, got "
                    f"{_outline(tuple(args), kwargs)}. "
                    "Do give batches of the structure of the example inputs."
                )
        for node, leaf in zip(self._inputs, leaves, strict=True):
            _check_leaf(node, leaf)
        return leaves


def _open_axes(node: fx.Node) -> tuple[int, ...]:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return ()
    # A captured tensor has symbols where its shape says int.
    lengths: tuple[Any, ...] = tuple(value.shape)
    return tuple(axis for axis, length in enumerate(lengths) if is_open(length))


def _outline(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    parts = [f"{len(args)} positional"] if args or not kwargs else []
    if kwargs:
        parts.append("keywords " + ", ".join(kwargs))
    return " and ".join(parts)


def _check_leaf(node: fx.Node, leaf: Any) -> None:
    expected = node.meta.get("val")
    if not isinstance(expected, Tensor):
        if "val" in node.meta and not isinstance(leaf, Tensor) and leaf != expected:
            raise CalibrationError(
                f"model input {node.name}: expected {expected!r}, which the program was captured with, got "
                f"{leaf!r}. Do trace with the value that the batches hold."
            )
        return
    shape = [None if axis in _open_axes(node) else int(n) for axis, n in enumerate(expected.shape)]
    described = "[" + ", ".join("any" if n is None else str(n) for n in shape) + "]"
    if not isinstance(leaf, Tensor):
        raise CalibrationError(
            f"model input {node.name}: expected a tensor {described}, got {type(leaf).__name__}. "
            "Do give batches of the structure of the example inputs."
        )
    if leaf.dtype != expected.dtype:
        raise CalibrationError(
            f"model input {node.name}: expected {expected.dtype}, got {leaf.dtype}. Do convert the data, "
            "or trace with example inputs of that type."
        )
    fits = leaf.ndim == len(shape) and all(
        n is None or n == m for n, m in zip(shape, leaf.shape, strict=True)
    )
    if not fits:
        fixed_batch = leaf.ndim == len(shape) > 0 and shape[0] not in (None, leaf.shape[0])
        same_sample = fixed_batch and all(
            n in (None, m) for n, m in zip(shape[1:], leaf.shape[1:], strict=True)
        )
        remedy = (
            "The program was captured with this batch size fixed: give batches of that size (drop_last=True)"
            if same_sample
            else "Do give samples of the shape that the model was traced with"
        )
        raise CalibrationError(
            f"model input {node.name}: expected shape {described}, got {list(leaf.shape)}. {remedy}, or "
            "trace with other example inputs."
        )
