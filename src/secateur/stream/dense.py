"""Run the captured program of a dense model node by node, on as many batches as there are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx
from torch.export import ExportedProgram

from secateur.calibration import Batch
from secateur.calibration.padding import NO_PADDING, Padding
from secateur.graph.graph import Graph
from secateur.graph.nodes import tensor_of
from secateur.graph.programs import leaves_of
from secateur.stream.calls import Call, ProgramCalls

Show = Callable[[fx.Node, Any, Mapping[fx.Node, Any]], None]
"""Called with a node, its value, and the values that are held, right after the node was computed."""


@dataclass
class Values:
    """The values of the programs for one batch. Only values that a later node still reads are held.

    Attributes:
        dense: Node -> value in the dense program.
        small: Node -> value in the pruned program; empty if there is only the dense one.
        position: Index of the first node that has not run.
        padding: Which positions of the batch are padding.
    """

    dense: dict[fx.Node, Any] = field(default_factory=dict)
    small: dict[fx.Node, Any] = field(default_factory=dict)
    position: int = 0
    padding: Padding = NO_PADDING

    def fork(self) -> Values:
        """Return a copy that can be advanced separately. It shares the tensors."""
        return Values(dict(self.dense), dict(self.small), self.position, self.padding)

    def tensors(self) -> list[Tensor]:
        """Return all tensors that are held, of both programs."""
        return [v for side in (self.dense, self.small) for v in side.values() if isinstance(v, Tensor)]


class Dense(ProgramCalls):
    """The program of a dense model, and its tensors. Running it does not change the model."""

    def __init__(self, graph: Graph, program: ExportedProgram | None = None) -> None:
        """Prepare a program: see `ProgramCalls`."""
        super().__init__(graph, program)
        self._dense: dict[fx.Node, Any] = {}
        for node, name in self.names.items():
            tensor = tensor_of(self.program, name)
            self._dense[node] = tensor.detach() if isinstance(tensor, Tensor) else tensor
        for node in self.program.graph.nodes:
            if node.op == "get_attr":
                self._dense[node] = self.program.graph_module.get_submodule(str(node.target))
        self._last_read = self._nodes_by_last_read()

    def _nodes_by_last_read(self) -> list[list[fx.Node]]:
        """List, for each position, the nodes whose values are read there for the last time."""
        last_read: list[list[fx.Node]] = [[] for _ in self.nodes]
        for node in (*self.nodes, *self.inputs):
            users = [self.index[user] for user in node.users if user in self.index]
            if len(users) == len(node.users):
                last = max(users, default=self.index.get(node))
                if last is not None:
                    last_read[last].append(node)
        return last_read

    def start(self, batch: Batch) -> Values:
        """Return the values before the first node: the inputs, and copies of tensors written in place."""
        values = Values(padding=batch.padding)
        leaves = leaves_of(self.program, batch.args, batch.kwargs)
        for node, leaf in zip(self.inputs, leaves, strict=True):
            leaf = leaf.detach() if isinstance(leaf, Tensor) else leaf
            values.dense[node] = leaf.clone() if node.name in self.writes else leaf
        for node in self.names:
            if node.name in self.writes:
                values.dense[node] = self._dense[node].clone()
        return values

    def advance(self, values: Values, stop: int, show: Show | None = None) -> None:
        """Run the nodes from ``values.position`` up to, not including, position `stop`.

        Args:
            values: The batch's values; they are changed.
            stop: A position.
            show: Called for each node that is computed.
        """
        for k in range(values.position, stop):
            node = self.nodes[k]
            if node not in values.dense:
                values.dense[node] = self.run_call(Call.captured(node), values.dense, self._dense)
            if show is not None:
                show(node, values.dense[node], values.dense)
            self._advance_also(node, values)
            for gone in self._last_read[k]:
                values.dense.pop(gone, None)
                values.small.pop(gone, None)
        values.position = max(values.position, stop)

    def _advance_also(self, node: fx.Node, values: Values) -> None:
        """Run a node of the other program, where there is one."""

    def run_call(self, call: Call, values: dict[fx.Node, Any], tensors: dict[fx.Node, Any]) -> Any:
        """Return what a call gives; `tensors` has what is not in `values`."""

        def value_of(node: fx.Node) -> Any:
            return values[node] if node in values else tensors[node]

        args = fx.map_arg(call.args, value_of)
        kwargs = fx.map_arg(call.kwargs, value_of)
        return call.run(*args, **kwargs)

    def tensors_read(self, nodes: Iterable[fx.Node]) -> list[Any]:
        """Return the model's tensors that some nodes read, of all programs."""
        read = {n for node in nodes for n in node.all_input_nodes if n in self.names}
        return [self._dense[node] for node in read]
