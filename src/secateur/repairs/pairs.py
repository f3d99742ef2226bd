"""Run the dense and the pruned model side by side, node by node.

Both sides are the program that was captured from the dense model. The dense side uses the dense model's
tensors. The pruned side uses the pruned model's tensors, and constants (such as shapes) that follow the
plan. So each node has a value on both sides, and repairs work the same for every form of a pruned model.
Running changes neither model. Only `Pair.store` writes repaired tensors into the pruned model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from secateur.calibration import Batch, map_tensors
from secateur.common.mapped import copied, stored_like
from secateur.graph.graph import Graph
from secateur.graph.inline import modes_of
from secateur.graph.kept import Mask
from secateur.graph.resizing import graph_at
from secateur.repairs.joints import CLONE, idle_nodes, joints
from secateur.stream.calls import Call
from secateur.stream.dense import Dense, Values
from secateur.targets.blocks.remove import removed_paths
from secateur.targets.units.graph_form.constants import Constants
from secateur.targets.units.graph_form.rewrites import Scaled
from secateur.targets.units.record import record_of
from secateur.targets.units.tensors import cut, removed_positions, tensor_called


class Pair(Dense):
    """The dense and the pruned program, and their tensors.

    "At the kept positions" below means: a value with the shape of the pruned model's. In the masked form
    the pruned program has dense shapes, so its values are cut to the kept positions.

    Attributes:
        planned: Node -> its call in the pruned program.
        idle: Nodes that do not run in the pruned program, since their block is bypassed.
    """

    def __init__(self, graph: Graph, small: nn.Module, first: Pair | None = None) -> None:
        """Prepare both programs and copy the pruned model's tensors.

        Args:
            graph: The trace of the dense model.
            small: The pruned model that `apply` returned. It may have been repaired since.
            first: The pair for another input size; the new pair shares its tensors.

        Raises:
            ApplyError: If an operator's constants cannot follow the plan.
        """
        super().__init__(graph)
        record = record_of(small)
        self._masked = record.form == "masked"
        self._constants = Constants(graph.kept(removed_positions(record.plan)))
        self._small: dict[fx.Node, Any] = dict(self._dense)
        self._indices: dict[tuple[fx.Node, int], Tensor] = {}
        # _changed: replaced tensors by state-dict name. _aliases: the pruned model's tensors by the id of the
        # original, so that tied tensors stay tied.
        self._changed: dict[str, Tensor] = {} if first is None else first._changed
        self._aliases: dict[int, Tensor] = {} if first is None else first._aliases
        for node, name in self.names.items():
            if isinstance(self._dense[node], Tensor):
                self._small[node] = self._counterpart(node, name, small)
        bypassed = removed_paths(record.plan)
        self._joints = joints(self, bypassed)
        self.idle = idle_nodes(self, self._joints) if bypassed else set()
        self.planned = {node: self._pruned_call(node) for node in self.nodes}
        for node, before in self._joints.items():
            self._hold(before, node)

    def _counterpart(self, node: fx.Node, name: str, small: nn.Module) -> Tensor:
        """Return an alias of the pruned model's tensor for a placeholder. Tied tensors share one alias."""
        if name in self.program.constants:
            # Made in `forward`, so the pruned model holds no such tensor by name: cut the dense one.
            # The pruned program's own constant may have another dtype.
            masks = [] if self._masked else self.kept(node)
            gone = {k: np.flatnonzero(~m) for k, m in enumerate(masks) if not m.all()}
            return cut(self._dense[node], gone).clone()
        tensor = tensor_called(small, name)
        if id(tensor) not in self._aliases:
            self._aliases[id(tensor)] = tensor.detach()
        return self._aliases[id(tensor)]

    def _hold(self, node: fx.Node, until: fx.Node) -> None:
        """Keep a node's value until a later node ran."""
        place = self.index[until]
        for k, gone in enumerate(self._last_read[:place]):
            if node in gone:
                self._last_read[k] = [other for other in gone if other is not node]
                self._last_read[place].append(node)

    def _pruned_call(self, node: fx.Node) -> Call:
        """Return a node's call in the pruned program: constants in its arguments follow the plan."""
        if node in self._joints:
            return Call(CLONE, (self._joints[node],), {})
        call = self._constants.follow(node)
        if call is None:
            return Call.captured(node)
        arguments = map_tensors(lambda t: t.to(self.graph.device), call.arguments)
        return Call.bound(call.target, arguments, modes_of(node))

    def start(self, batch: Batch) -> Values:
        """Return the values before the first node: the inputs, and copies of tensors written in place."""
        values = super().start(batch)
        for node, value in values.dense.items():
            if node in self.names:
                values.small[node] = self._small[node].clone()
            else:
                values.small[node] = value.clone() if node.name in self.writes else value
        return values

    def _advance_also(self, node: fx.Node, values: Values) -> None:
        if node in self.idle:
            return
        values.small[node] = self.run_call(self._call(node), values.small, self._small)

    def run_call(self, call: Call, values: dict[fx.Node, Any], tensors: dict[fx.Node, Any]) -> Any:
        """Return what a call gives, where some of a size that the program computes may stay."""

        def size(argument: Any) -> Any:
            return argument.of(values[argument.size]) if isinstance(argument, Scaled) else argument

        args: Any = fx.node.map_aggregate(call.args, size)
        kwargs: Any = fx.node.map_aggregate(call.kwargs, size)
        return super().run_call(replace(call, args=args, kwargs=kwargs), values, tensors)

    def _call(self, node: fx.Node) -> Call:
        """Return a node's call in the pruned model: the masked form has the dense shapes."""
        return Call.captured(node) if self._masked and node not in self._joints else self.planned[node]

    def tensors_read(self, nodes: Iterable[fx.Node]) -> list[Any]:
        """Return the tensors of both models that some nodes read."""
        read = {n for node in nodes for n in node.all_input_nodes if n in self.names}
        return [side[node] for node in read for side in (self._dense, self._small)]

    def dense_value(self, node: fx.Node, values: Values) -> Any:
        """Return a node's dense value at the kept positions. It is computed if its inputs are there."""
        if node not in values.dense and node not in self._dense:
            values.dense[node] = self.run_call(Call.captured(node), values.dense, self._dense)
        return self.restrict(node, values.dense.get(node, self._dense.get(node)))

    def small_value(self, node: fx.Node, values: Values) -> Any:
        """Return a node's pruned value at the kept positions. It is computed if its inputs are there."""
        if node in values.small or node in self._small:
            found = values.small.get(node, self._small.get(node))
        else:
            found = self.run_call(self._call(node), values.small, self._small)
        return self.restrict(node, found) if self._masked else found

    def run_chain(self, chain: Sequence[fx.Node], source: fx.Node, value: Tensor, *, dense: bool) -> Tensor:
        """Run a chain of nodes on a value of your choice, and return the last node's output.

        Args:
            chain: The nodes in order. Each reads the node before it, and beside that only model tensors.
            source: The node that the first node of the chain reads.
            value: Used in place of the value of `source`, at the kept positions.
            dense: Use the tensors of the dense program; if False, of the pruned one.
        """
        tensors = self._dense if dense else self._small
        for node in chain:
            inputs = {
                n: tensors[n] if not (dense or self._masked) else self.restrict(n, tensors[n])
                for n in node.all_input_nodes
                if n is not source
            }
            value = self.run_call(self.planned[node], {**inputs, source: value.clone()}, {})
            source = node
        return value

    def kept(self, node: fx.Node) -> list[Mask]:
        """Return a boolean mask for each axis of a node's dense value. True means kept."""
        return self._constants.kept(node)

    def restrict(self, node: fx.Node, value: Any) -> Any:
        """Cut a tensor of the dense shape to the kept positions. Other values are returned unchanged."""
        if isinstance(value, Tensor):
            for axis, mask in enumerate(self.kept(node)):
                if not mask.all():
                    value = value.index_select(axis, self._positions(node, axis, value.device))
        return value

    def _positions(self, node: fx.Node, axis: int, device: torch.device) -> Tensor:
        if (node, axis) not in self._indices:
            stays = np.flatnonzero(self.kept(node)[axis])
            self._indices[node, axis] = torch.as_tensor(stays, device=device)
        return self._indices[node, axis].to(device)

    def tensor(self, node: fx.Node) -> Tensor:
        """Return the pruned program's tensor for a placeholder, at the kept positions."""
        found: Tensor = self._small[node]
        return self.restrict(node, found) if self._masked else found

    def dense_tensor(self, node: fx.Node) -> Tensor:
        """Return the dense program's tensor for a placeholder, at the kept positions."""
        found: Tensor = self.restrict(node, self._dense[node])
        return found

    def same(self, node: fx.Node) -> list[fx.Node]:
        """Return all placeholders of the same tensor. There are several if weights are tied."""
        return [n for n in self.names if self._small[n] is self._small[node]]

    def readers(self, node: fx.Node) -> set[fx.Node]:
        """Return all nodes that read the tensor of a placeholder, ties included."""
        return {user for n in self.same(node) for user in n.users}

    def replace(self, node: fx.Node, value: Tensor) -> None:
        """Overwrite the pruned program's tensor for a placeholder.

        Args:
            node: The placeholder.
            value: The new values at the kept positions.
        """
        alias: Tensor = self._small[node]
        value = value.to(alias.device, alias.dtype, copy=True, memory_format=torch.contiguous_format)
        if self._masked:
            axes = [self._positions(node, k, value.device) for k in range(value.ndim)]
            whole = copied(alias)
            whole[torch.meshgrid(*axes, indexing="ij")] = value
            value = whole
        alias.data = stored_like(value, alias)  # the alias gets other memory: the model keeps its values
        self._changed[self.names[node]] = alias

    def learnable(self, small: nn.Module) -> list[Tensor]:
        """Return the tensors of the pruned program that are parameters of `small`, each once, with gradients.

        They share the memory of the parameters: who changes them changes the model.
        """
        found = {}
        for node, name in self.names.items():
            alias = self._small[node]
            if isinstance(alias, Tensor) and name not in self.program.constants:
                if isinstance(tensor_called(small, name), nn.Parameter) and alias.is_floating_point():
                    found[id(alias)] = alias.requires_grad_()
        return [*found.values()]

    def store(self, small: nn.Module) -> None:
        """Write every tensor that `replace` changed into the pruned model `small`."""
        with torch.no_grad():
            for name, tensor in self._changed.items():
                tensor_called(small, name).copy_(tensor)


class Pairs:
    """The pairs of programs, one for each input size that occurs. Usually there is one.

    Attributes:
        first: The pair for the input size that was traced.
    """

    def __init__(self, graph: Graph, small: nn.Module) -> None:
        """Build the pair for the traced size. Other pairs are built when a batch needs them."""
        self.first = Pair(graph, small)
        self._small = small
        self._all = {id(graph.program): self.first}

    def of(self, batch: Batch) -> Pair:
        """Return the pair for the input size of a batch.

        Raises:
            CalibrationError: If the model has no program for this size, or that program couples other
                units than the traced one.
        """
        graph = self.first.graph
        program = graph.programs.of(batch.args, dict(batch.kwargs))
        if id(program) not in self._all:
            self._all[id(program)] = Pair(graph_at(graph, program), self._small, self.first)
        return self._all[id(program)]
