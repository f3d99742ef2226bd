"""Runs captured programs without touching the model that they were captured from.

No hooks and no copies: a program's parameters are fed as detached aliases, which share the model's storage
but have gradients of their own, and whatever the program writes in place is fed as a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from secateur.calibration.reading import StandIn
from secateur.errors import ScoreError
from secateur.graph.datasizes import depends_on_data
from secateur.graph.inline import Interpreter
from secateur.graph.matching import matched
from secateur.graph.nodes import lifted, where
from secateur.graph.programs import Programs, batch_axes, leaves_of
from secateur.graph.writes import written

Read = Callable[[fx.Node], Any]
"""Returns the value of an input of the watched node."""

Watcher = Callable[[str, Tensor, Read], None]
"""Called right after a node was computed, with its name, its value, and a function to read its inputs."""


class NotObservedError(ScoreError):
    """A node that a signal watches does not exist at the input size of a batch, or is another one."""


class _Watching(Interpreter):
    """Runs the program's graph, and passes the values of watched nodes to the watcher."""

    def __init__(self, module: fx.GraphModule, cloned: frozenset[str]) -> None:
        super().__init__(module)
        self.watched: Collection[str] = ()
        self.watcher: Watcher | None = None
        self._cloned = cloned

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op == "placeholder" and n.name in self._cloned and isinstance(value, Tensor):
            return value.clone()
        if self.watcher is not None and n.name in self.watched:
            self.watcher(n.name, value, self.env.__getitem__)
        return value


class Runner:
    """One program, ready to run.

    Attributes:
        writes: Whether it writes into a value after the value was computed.
        nodes: Its nodes by their names in the first program.
    """

    def __init__(self, programs: Programs, program: ExportedProgram, tensors: dict[str, Tensor]) -> None:
        signature = program.graph_signature
        module = program.graph_module
        self._program = program
        self._lifted: list[Any] = []
        writes = written(module)
        self.writes = bool(writes)
        cloned: set[str] = set()
        for node, kind, target in lifted(program):
            # Aliasing can be followed for what is written directly; for the rest, a program that writes
            # anything gets copies of all but its parameters.
            if node.name in writes or (writes and kind is not InputKind.PARAMETER):
                cloned.add(node.name)
            if kind is InputKind.USER_INPUT:
                continue
            name = target or ""
            if name in program.state_dict:
                self._lifted.append(tensors.setdefault(name, program.state_dict[name].detach()))
            else:
                constant = program.constants[name]
                self._lifted.append(constant.detach() if isinstance(constant, Tensor) else constant)
        self._outputs = [s.kind is OutputKind.USER_OUTPUT for s in signature.output_specs]
        self._interpreter = _Watching(module, frozenset(cloned))
        # By the names of the first program, which are those that callers know.
        nodes = {node: node for node in program.graph.nodes}
        if program is not programs.first:
            nodes = matched(programs.first, program)
        self.nodes = {node.name: other for node, other in nodes.items()}
        self._first = {node.name: node for node in nodes}
        self._batch_axes: dict[str, tuple[int, ...]] = {}

    def reader(self, name: str, value_of: Read) -> Read:
        """Return a function that gives the values that a node reads.

        Args:
            name: The node's name in the first program.
            value_of: Gives the value of a node of this program.

        Returns:
            A function that takes a node of the first program.
        """
        own, first = self.nodes[name].all_input_nodes, self._first[name].all_input_nodes
        operands = dict(zip(first, own, strict=True)) if len(own) == len(first) else {}
        return lambda node: value_of(operands.get(node) or self.nodes[node.name])

    def batch_axes(self, name: str) -> tuple[int, ...]:
        """The axes of a node's output whose length depends on that of the batch."""
        if name not in self._batch_axes:
            self._batch_axes[name] = batch_axes(self._program, self.nodes[name])
        return self._batch_axes[name]

    def __call__(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], watched: Iterable[str], watcher: Watcher | None
    ) -> Any:
        """Run the program, and return the model's output."""
        leaves = leaves_of(self._program, args, kwargs)
        names = {self.nodes[name].name: name for name in watched}
        interpreter = self._interpreter

        if watcher is not None:
            interpreter.watcher = lambda name, value, read: watcher(
                names[name], value, self.reader(names[name], read)
            )
        interpreter.watched = names
        try:
            # A generator of the model's stays where it is; one that forward makes starts anew in each call.
            held = [v.clone_state() if isinstance(v, torch.Generator) else v for v in self._lifted]
            outputs = interpreter.run(*held, *leaves)
        finally:
            # The interpreter would keep the last values, and with them the autograd graph, alive.
            interpreter.env, interpreter.watched, interpreter.watcher = {}, (), None
        given = [value for value, is_user in zip(outputs, self._outputs, strict=True) if is_user]
        return pytree.tree_unflatten(given, self._program.call_spec.out_spec)


class CapturedModel(StandIn):
    """The captured programs as one function with the model's signature.

    Nodes are named as in the first program. A program for inputs of other sizes has other nodes; each gets
    the name of the corresponding node in the first program (`secateur.graph.matching`).

    Attributes:
        tensors: Aliases of parameters and buffers by state-dict name.
        parameters: Names of those that are parameters.
    """

    def __init__(self, programs: Programs, differentiable: Collection[str] = ()) -> None:
        """Prepare a run.

        Args:
            programs: From ``graph.programs``.
            differentiable: State-dict names of the parameters to take gradients of.
        """
        super().__init__(programs.model)
        program = programs.first
        # The same tensor under two names gets one alias, so that its gradients add up.
        aliases: dict[int, Tensor] = {}
        self.tensors: dict[str, Tensor] = {
            name: aliases.setdefault(id(tensor), tensor.detach())
            for name, tensor in program.state_dict.items()
        }
        self.parameters = frozenset(program.graph_signature.parameters)
        for name in differentiable:
            self.tensors[name].requires_grad_()
        self._programs = programs
        self._runners: dict[int, Runner] = {}
        self._running = self.use(program)
        self._watched: Collection[str] = ()
        self._watcher: Watcher | None = None

    def use(self, program: ExportedProgram) -> Runner:
        """Choose the program whose values are shown from now on, and return it, ready to run."""
        if id(program) not in self._runners:
            self._runners[id(program)] = Runner(self._programs, program, self.tensors)
        self._running = self._runners[id(program)]
        return self._running

    @property
    def device(self) -> torch.device:
        """Device of the parameters; the CPU if there are none."""
        return next((t.device for t in self.tensors.values()), torch.device("cpu"))

    @property
    def writes(self) -> bool:
        """Whether the current program writes into a value after the value was computed."""
        return self._running.writes

    def batch_axes(self, node_name: str) -> tuple[int, ...]:
        """The axes of a node's output whose length depends on that of the batch, in the current program."""
        return self._running.batch_axes(node_name)

    def counts_data(self, node_name: str) -> bool:
        """Whether the data decide how long an axis of a node's output is, as with the tokens of an expert."""
        value = self._running.nodes[node_name].meta["val"]
        return any(map(depends_on_data, value.shape))

    def watch(self, nodes: Collection[str], watcher: Watcher | None) -> None:
        """Show the values of these nodes to `watcher` in later calls. None stops it."""
        self._watched, self._watcher = nodes, watcher

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program for these arguments and return what the model would.

        Raises:
            CalibrationError: No program accepts the arguments.
            NotObservedError: The one that does not compute what is watched.
        """
        self.use(self._programs.of(args, kwargs))
        missing = [name for name in self._watched if name not in self._running.nodes]
        if missing:
            raise NotObservedError(
                f"batches: expected inputs at whose sizes the model calls {self._described(missing[0])} as "
                "often as at the traced ones, got others: it repeats layers for each position, say. Pad all "
                "batches to the traced sizes, or use signals that read weights, such as taylor."
            )
        return self._running(args, kwargs, self._watched, self._watcher)

    def _described(self, name: str) -> str:
        node = next(n for n in self._programs.first.graph.nodes if n.name == name)
        return where(node) or name
