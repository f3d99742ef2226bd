"""Signals from the input features of the layers that read a unit: their mean, their mean square, the weights.

An input feature is one column of a layer as a regression: an input of a linear layer, or an input channel of
a convolution at one place of the kernel (`secateur.repairs.regression.layers`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from secateur.calibration.padding import Padding
from secateur.graph.graph import Graph
from secateur.graph.groups import Group, Site
from secateur.repairs.regression.layers import Site as LayerCall
from secateur.repairs.regression.layers import counted
from secateur.repairs.regression.readers import unit_of
from secateur.signals.signal import Context, Need, Signal, Step, Tally, TensorTally, Vector
from secateur.signals.units.readers import Readers, rows_at
from secateur.stream.calls import Call


@dataclass(frozen=True, eq=False)
class Features:
    """The input features of one call of a layer, over all positions of all samples.

    Attributes:
        count: Number of positions.
        mean: Mean of each feature. float64 [features]
        square: Mean square of each feature. float64 [features]
        weight: What multiplies each feature. float64 [features, outputs]
    """

    count: float
    mean: Tensor
    square: Tensor
    weight: Tensor


class FeatureSignal(Signal):
    """A signal that sums a worth of input features over those that a unit gives.

    Where no linear layer or convolution reads a group, the units' own activations take the place of the
    features, each with a weight of 1.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"calls"})

    def held(self, graph: Graph, classes: int) -> dict[str, int]:
        """16 bytes for each feature of each reading layer."""
        readers = Readers(graph, self.name)

        def features(reader: LayerCall | Site) -> int:
            if isinstance(reader, Site):
                return len(reader.unit)
            weight = readers.tensor(reader.weight).to("meta")
            return reader.layer.matrix(weight, Call.captured(reader.node))[:, :, 0].numel()

        return {g.name: sum(16 * features(r) for r in readers.readers(g)) for g in graph.groups}

    @staticmethod
    @abstractmethod
    def worth(features: Features) -> Tensor:
        """What each feature is worth; 0 or more. float64 [features]"""

    def start(self, context: Context) -> Tally:
        """Begin a run."""
        return _FeatureTally(self, context)


class _FeatureTally(TensorTally):
    """Sums features and their squares. Each reader is observed once, whatever groups it reads."""

    def __init__(self, signal: FeatureSignal, context: Context) -> None:
        self._signal, self._context = signal, context
        self._readers = Readers(context.graph, signal.name)
        self._read_by = {g.name: self._readers.readers(g) for g in context.graph.groups}
        self._sums: dict[LayerCall | Site, Tensor] = {}  # [3, parts, features]: count, sum, sum of squares
        self._shown: dict[str, list[LayerCall | Site]] = {}
        for reader in dict.fromkeys(r for found in self._read_by.values() for r in found):
            weight = self._weight(reader)
            self._sums[reader] = torch.zeros(3, *weight.shape[:2], dtype=torch.float64, device=weight.device)
            node = reader.node if isinstance(reader, Site) else reader.node.name
            self._shown.setdefault(node, []).append(reader)

    def _weight(self, reader: LayerCall | Site) -> Tensor:
        """What multiplies each feature. [parts, features, outputs]"""
        if isinstance(reader, Site):
            return torch.ones(1, len(reader.unit), 1, device=self._context.graph.device)
        weight = self._readers.tensor(reader.weight).detach()
        return reader.layer.matrix(weight, Call.captured(reader.node))

    def calls(self) -> Collection[str]:
        """The layers, and the sites of groups that no layer reads."""
        return frozenset(self._shown)

    def call(self, node: str, value: Tensor, read: Callable[[fx.Node], Any], step: Step) -> None:
        """Add up what one of them reads."""
        for reader in self._shown[node]:
            for x in self._rows(reader, value, read, step.padding):
                rows = x.detach().double()
                self._sums[reader][0] += rows.shape[1]
                self._sums[reader][1] += rows.sum(1)
                self._sums[reader][2] += rows.square().sum(1)

    def _rows(
        self, reader: LayerCall | Site, value: Tensor, read: Callable[[fx.Node], Any], padding: Padding
    ) -> Iterator[Tensor]:
        """The features at each position that is no padding. [parts, positions, features]"""
        if isinstance(reader, Site):
            rows, index = rows_at(reader, value, padding)
            yield rows[:, index]
            return
        call, weight = Call.captured(reader.node), self._readers.tensor(reader.weight)
        for real, (x, _) in reader.pieces(call, weight, padding, read(reader.x), value):
            yield reader.layer.columns(x, weight, call)[:, counted(real)]

    def held(self) -> dict[str, Tensor]:
        """All sums, by number."""
        return {str(k): sums for k, sums in enumerate(self._sums.values())}

    def finish(self) -> Mapping[str, Vector]:
        """The worth of a unit's features, summed over all layers that read it."""
        found = {}
        for group in self._context.graph.groups:
            found[group.name] = np.zeros(group.size)
            for reader in self._read_by[group.name]:
                for worth, unit in self._worths(reader, group):
                    mine = unit >= 0
                    found[group.name] += np.bincount(unit[mine], worth[mine], minlength=group.size)
        return found

    def _worths(
        self, reader: LayerCall | Site, group: Group
    ) -> Iterator[tuple[NDArray[np.float64], NDArray[np.int64]]]:
        """What each feature of a reader is worth, and the group's unit that it belongs to; -1 for none."""
        weight = self._weight(reader).double()
        count, total, squares = self._sums[reader]
        n = count.clamp_min(1)
        each = [
            self._signal.worth(Features(float(c[0]), m, s, w))
            for c, m, s, w in zip(count, total / n, squares / n, weight, strict=True)
        ]
        worth = torch.cat(each).cpu().numpy()
        if isinstance(reader, Site):
            yield worth, reader.unit
            return
        tensor = self._readers.tensor(reader.weight)
        for piece in group.of_role("consume"):
            if reader in self._readers.of(piece):
                unit = reader.layer.matrix(unit_of(piece, tensor), Call.captured(reader.node))[:, :, 0]
                yield worth, unit.flatten().cpu().numpy()
