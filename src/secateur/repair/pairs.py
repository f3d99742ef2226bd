"""The dense and the pruned model as one program, run side by side, node by node.

Both are the captured program: the dense one with the model's own tensors, the pruned one with those of
the pruned model and the constants that follow the plan. So each node has a value in both, and repairs
work alike on all forms. Nothing here changes either model; `Pair.store` writes what a repair decided.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from secateur.apply.constants import Constants
from secateur.apply.record import record_of
from secateur.apply.rewrites import Mask
from secateur.apply.tensors import cut, tensor_called
from secateur.calibration import Batch, map_tensors
from secateur.graph.graph import Graph
from secateur.graph.inline import modes_of
from secateur.graph.programs import leaves_of
from secateur.graph.resizing import graph_at
from secateur.graph.walk import tensor_of
from secateur.regression.calls import Call, ProgramCalls


@dataclass
class Values:
    """What the nodes of both programs computed for one batch, as far as later nodes still read it.

    Attributes:
        dense: Node -> value in the dense program.
        small: Node -> value in the pruned program.
        position: Index of the first node that has not run.
    """

    dense: dict[fx.Node, Any] = field(default_factory=dict)
    small: dict[fx.Node, Any] = field(default_factory=dict)
    position: int = 0

    def fork(self) -> Values:
        """Values that can go on by themselves; the tensors are shared."""
        return Values(dict(self.dense), dict(self.small), self.position)

    def tensors(self) -> list[Tensor]:
        """Every tensor that is held."""
        return [v for side in (self.dense, self.small) for v in side.values() if isinstance(v, Tensor)]


class Pair(ProgramCalls):
    """The two programs.

    Attributes:
        planned: Node -> its call in the pruned program.
    """

    def __init__(self, graph: Graph, small: nn.Module, first: Pair | None = None) -> None:
        """Pair the programs.

        Args:
            graph: The trace of the dense model.
            small: What `apply` made of it, perhaps repaired since.
            first: The pair of another size, whose tensors this one shares.

        Raises:
            ApplyError: If an operator's constants cannot follow the plan.
        """
        super().__init__(graph)
        record = record_of(small)
        program = graph.program
        self._masked = record.form == "masked"
        self._constants = Constants.of(graph, record.plan)
        self._dense: dict[fx.Node, Any] = {}
        self._small: dict[fx.Node, Any] = {}
        self._indices: dict[tuple[fx.Node, int], Tensor] = {}
        # By state-dict name what was changed, and by identity the copies of the pruned model's tensors.
        self._changed: dict[str, Tensor] = {} if first is None else first._changed
        self._copies: dict[int, Tensor] = {} if first is None else first._copies
        for node, name in self.names.items():
            self._dense[node] = dense = tensor_of(program, name)
            if isinstance(dense, Tensor):
                self._dense[node] = dense.detach()
                self._small[node] = self._counterpart(node, name, dense, small)
            else:
                self._small[node] = dense
        for node in program.graph.nodes:
            if node.op == "get_attr":
                part = program.graph_module.get_submodule(str(node.target))
                self._dense[node] = self._small[node] = part
        self.planned = {node: self._follow(node) for node in self.nodes}
        self._dies = self._last_uses()

    def _counterpart(self, node: fx.Node, name: str, dense: Tensor, small: nn.Module) -> Tensor:
        """A copy of the pruned model's tensor; tied ones get one."""
        if (
            name in self.graph.program.constants
        ):  # made in forward; the pruned program's may have another dtype
            masks = [] if self._masked else self.kept(node)
            return cut(dense, {k: np.flatnonzero(~m) for k, m in enumerate(masks) if not m.all()}).clone()
        tensor = tensor_called(small, name)
        if id(tensor) not in self._copies:
            self._copies[id(tensor)] = tensor.detach().clone()
        return self._copies[id(tensor)]

    def _follow(self, node: fx.Node) -> Call:
        call = self._constants.follow(node)
        if call is None:
            return Call.captured(node)
        arguments = map_tensors(lambda t: t.to(self.graph.device), call.arguments)  # positions that follow
        return Call.bound(call.target, arguments, modes_of(node))

    def _last_uses(self) -> list[list[fx.Node]]:
        """For each position, the nodes whose values nothing reads after it."""
        dies: list[list[fx.Node]] = [[] for _ in self.nodes]
        for node in (*self.nodes, *self.inputs):
            users = [self.index[user] for user in node.users if user in self.index]
            if len(users) == len(node.users):
                last = max(users, default=self.index.get(node))
                if last is not None:
                    dies[last].append(node)
        return dies

    def start(self, batch: Batch) -> Values:
        """The values before the first node: the inputs, and copies of what the program writes to."""
        values = Values()
        leaves = leaves_of(self.graph.program, batch.args, batch.kwargs)
        for node, leaf in zip(self.inputs, leaves, strict=True):
            values.dense[node] = values.small[node] = leaf
            if node.name in self.writes:
                values.dense[node], values.small[node] = leaf.clone(), leaf.clone()
        for node in self.names:
            if node.name in self.writes:
                values.dense[node] = self._dense[node].clone()
                values.small[node] = self._small[node].clone()
        return values

    def advance(self, values: Values, stop: int) -> None:
        """Run all nodes before position `stop` that have not run."""
        for k in range(values.position, stop):
            node = self.nodes[k]
            dense = Call.captured(node)
            if node not in values.dense:
                values.dense[node] = self._run(dense, values.dense, self._dense)
            values.small[node] = self._run(
                dense if self._masked else self.planned[node], values.small, self._small
            )
            for gone in self._dies[k]:
                values.dense.pop(gone, None)
                values.small.pop(gone, None)
        values.position = max(values.position, stop)

    def dense_value(self, node: fx.Node, values: Values) -> Any:
        """A node's value in the dense program, computed if it is next in line, at the kept positions."""
        if node not in values.dense and node not in self._dense:
            values.dense[node] = self._run(Call.captured(node), values.dense, self._dense)
        return self.restrict(node, values.dense.get(node, self._dense.get(node)))

    def small_value(self, node: fx.Node, values: Values) -> Any:
        """A node's value in the pruned program, computed if it is next in line, at the kept positions."""
        if node in values.small or node in self._small:
            found = values.small.get(node, self._small.get(node))
        else:
            call = self.planned[node]
            if self._masked:
                call = Call.captured(node)
            found = self._run(call, values.small, self._small)
        return self.restrict(node, found) if self._masked else found

    def run_chain(self, chain: Sequence[fx.Node], source: fx.Node, value: Tensor, *, dense: bool) -> Tensor:
        """What a chain of nodes, each the only reader of the one before, makes of another value.

        Args:
            chain: The nodes; all they read beside the chain are tensors of the model.
            source: The node whose value the first of them reads.
            value: The value to read in its place, at the kept positions.
            dense: With the tensors of the dense program, else with those of the pruned one.
        """
        tensors = self._dense if dense else self._small
        for node in chain:
            inputs = {
                n: tensors[n] if not (dense or self._masked) else self.restrict(n, tensors[n])
                for n in node.all_input_nodes
                if n is not source
            }
            value = self._run(self.planned[node], {**inputs, source: value.clone()}, {})
            source = node
        return value

    def _run(self, call: Call, values: dict[fx.Node, Any], tensors: dict[fx.Node, Any]) -> Any:
        def value_of(node: fx.Node) -> Any:
            return values[node] if node in values else tensors[node]

        args = fx.map_arg(call.args, value_of)
        kwargs = fx.map_arg(call.kwargs, value_of)
        return call.run(*args, **kwargs)

    def kept(self, node: fx.Node) -> list[Mask]:
        """Which positions of each axis of a node's dense value stay."""
        return self._constants.kept(node)

    def restrict(self, node: fx.Node, value: Any) -> Any:
        """A value shaped like the dense one, at the kept positions."""
        if isinstance(value, Tensor):
            for axis, mask in enumerate(self.kept(node)):
                if not mask.all():
                    value = value.index_select(axis, self._positions(node, axis, value.device))
        return value

    def _positions(self, node: fx.Node, axis: int, device: torch.device) -> Tensor:
        if (node, axis) not in self._indices:
            stays = np.flatnonzero(self.kept(node)[axis])
            self._indices[node, axis] = torch.as_tensor(stays, device=device)
        return self._indices[node, axis]

    def tensor(self, node: fx.Node) -> Tensor:
        """The pruned program's tensor behind a placeholder, at the kept positions."""
        found: Tensor = self._small[node]
        return self.restrict(node, found) if self._masked else found

    def dense_tensor(self, node: fx.Node) -> Tensor:
        """The dense program's tensor behind a placeholder, at the kept positions."""
        found: Tensor = self.restrict(node, self._dense[node])
        return found

    def same(self, node: fx.Node) -> list[fx.Node]:
        """The placeholders that stand for the same tensor: several, where weights are tied."""
        return [n for n in self.names if self._small[n] is self._small[node]]

    def readers(self, node: fx.Node) -> set[fx.Node]:
        """All nodes that read the tensor behind a placeholder."""
        return {user for n in self.same(node) for user in n.users}

    def replace(self, node: fx.Node, value: Tensor) -> None:
        """Write the kept positions of the pruned program's tensor behind a placeholder."""
        target: Tensor = self._small[node]
        value = value.to(target.dtype, copy=True)  # it may share memory with the target
        if self._masked:
            axes = [self._positions(node, k, value.device) for k in range(value.ndim)]
            target[torch.meshgrid(*axes, indexing="ij")] = value
        else:
            target.copy_(value)
        self._changed[self.names[node]] = target

    def store(self, small: nn.Module) -> None:
        """Write every tensor that was replaced into a pruned model."""
        with torch.no_grad():
            for name, tensor in self._changed.items():
                tensor_called(small, name).copy_(tensor)


class Pairs:
    """The pairs of programs that the batches take: usually one, more where their sizes differ.

    Attributes:
        first: The pair of the traced sizes.
    """

    def __init__(self, graph: Graph, small: nn.Module) -> None:
        """Pair the programs of the traced sizes; the others when a batch needs them."""
        self.first = Pair(graph, small)
        self._small = small
        self._all = {id(graph.program): self.first}

    def of(self, batch: Batch) -> Pair:
        """The pair that takes a batch.

        Raises:
            CalibrationError: There is none, or it ties other units together.
        """
        graph = self.first.graph
        program = graph.programs.of(batch.args, dict(batch.kwargs))
        if id(program) not in self._all:
            self._all[id(program)] = Pair(graph_at(graph, program), self._small, self.first)
        return self._all[id(program)]
