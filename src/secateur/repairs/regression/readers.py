"""Which calls of layers read which units."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from secateur.graph.graph import Graph
from secateur.graph.groups import Slice
from secateur.graph.nodes import tensor_of
from secateur.repairs.regression.layers import Site
from secateur.stream.calls import Call, ProgramCalls


class LayerCalls:
    """Every call of a layer in a graph, in order of execution.

    Attributes:
        program_calls: Of the graph's program.
    """

    def __init__(self, graph: Graph) -> None:
        """Find them."""
        self.program_calls = ProgramCalls(graph)
        self._graph = graph
        first: dict[int, str] = {}  # tied tensors go by their first name
        for name in self.program_calls.names.values():
            first.setdefault(id(tensor_of(graph.program, name)), name)
        self._by_weight: dict[str, list[Site]] = {}
        for node in self.program_calls.nodes:
            site = Site.of(node, Call.captured(node), self.program_calls)
            if site is not None:
                name = first[id(self.tensor(site.weight))]
                self._by_weight.setdefault(name, []).append(site)

    def of(self, piece: Slice) -> list[Site]:
        """The calls that read a tensor of the model as their weight."""
        return self._by_weight.get(piece.tensor, [])

    def tensor(self, node: fx.Node) -> Tensor:
        """The tensor of the model that a placeholder stands for."""
        return tensor_of(self._graph.program, self.program_calls.names[node])


def unit_of(piece: Slice, weight: Tensor) -> Tensor:
    """Which unit each entry of a weight reads; -1 for none. Of the weight's shape."""
    along = torch.full((weight.shape[piece.axis],), -1, dtype=torch.int64, device=weight.device)
    along[torch.as_tensor(piece.position, device=weight.device)] = torch.as_tensor(
        piece.unit, device=weight.device
    )
    shape = [1] * weight.ndim
    shape[piece.axis] = -1
    return along.reshape(shape).expand(weight.shape)
