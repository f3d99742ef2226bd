"""The error that remains after a unit is removed and the layers that read it are refitted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from secateur.calibration.padding import Padding
from secateur.common.computing import data_device
from secateur.graph.graph import Graph
from secateur.graph.groups import Group, Site
from secateur.graph.nodes import hint
from secateur.repairs.regression.additions import addition_after
from secateur.repairs.regression.elimination import Consumer, eliminate
from secateur.repairs.regression.layers import Site as LayerCall
from secateur.repairs.regression.layers import counted
from secateur.repairs.regression.readers import unit_of
from secateur.signals.program import Read
from secateur.signals.signal import Context, Need, Signal, Step, Tally, TensorTally, Vector
from secateur.signals.units.columns import Columns, Ends, Uncorrelated, added_up
from secateur.signals.units.readers import Readers, rows_at
from secateur.stream.calls import Call

POSITIONS = 64
"""Of each sample a layer reads at most this many positions of its output, drawn at random, ..."""

SHARE = 4
"""... or one for this many of its columns, where that is more."""


@dataclass(frozen=True)
class Reconstruction(Signal):
    r"""The error that is left after the consuming layers have been refitted to the units that stay.

    Units of a group go one after another, each time the one whose loss adds the least error to the outputs
    of the layers that read the group, once these are refitted by least squares to what is left
    (`secateur.repairs.regression.elimination`). A unit's score is the error after it and all before it are
    gone,

    .. math:: U_j = \sum_c \frac{\min_W \lVert X_c^{(j)} W - Y_c \rVert^2}{\lVert Z_c - \bar Z_c \rVert^2},

    summed over the consuming layers c, with :math:`X_c^{(j)}` the inputs of the layer without those units,
    :math:`Y_c` its outputs, and :math:`Z_c` what these go into: the sum of a residual stream, where they go
    into one, else the outputs themselves. So the scores of all groups are on one scale,
    ``sc.Global(removal="reconstruction", normalise="none")`` spreads what damage remains evenly, and what
    others can stand in for goes first, however large it is. Consumers that are no regressions, such as the
    weights of an LSTM, do not count. For a group that only such consumers read, the units themselves take the
    place of the outputs: how much of their activations those that stay cannot tell, linearly.

    Units that are known to be uncorrelated, as the directions of `secateur.factorise` are, need no
    elimination: the error of each is its mean square times what its readers make of it, and errors add up.

    What few samples cannot tell does not count as replaceable: covariances of the columns are shrunk as far
    as samples differ (`shrunk`).

    Of large maps a layer reads positions drawn at random: `POSITIONS` of each sample, or as many as a quarter
    of its columns. So the cost of a sample does not grow with its resolution.

    Source: ThiNet (Luo et al. 2017, arXiv 1707.06342) chooses by reconstruction error; the elimination is
    the optimal brain surgeon's (Hassibi and Stork 1993); the common scale across groups is ours.

    Direction: large means that the loss cannot be undone, so worth more. Needs no labels.

    Example:
        >>> import torch
        >>> import secateur as sc
        >>> _ = torch.manual_seed(0)
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3, bias=False), torch.nn.Linear(3, 2, bias=False))
        >>> _ = net[0].weight.data.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [5.0, 5.0]]))
        >>> graph = sc.trace(net, torch.zeros(2, 2))
        >>> data = [torch.randn(50, 2) for _ in range(4)]
        >>> lost = sc.score(graph, data, sc.Reconstruction(), progress=False)["reconstruction"]["0"]
        >>> bool(sorted(lost)[0] < 0.01 < 0.1 < sorted(lost)[1])  # one unit costs nothing, two do
        True
    """

    name: ClassVar[str] = "reconstruction"
    needs: ClassVar[frozenset[Need]] = frozenset({"calls"})

    def held(self, graph: Graph, classes: int) -> dict[str, int]:
        """8 bytes for each pair of columns that consuming layers read."""
        layers = _Layers(graph, self.name)
        return {
            g.name: 8 * sum({layers.read_by(r): layers.pairs(r) for r in layers.readers(g)}.values())
            for g in graph.groups
        }

    def start(self, context: Context) -> Tally:
        """Begin a run."""
        return _ReconstructionTally(context)


class _Layers(Readers):
    """The calls of layers that read units, and the sizes of their sums."""

    @cached_property
    def uncorrelated(self) -> frozenset[LayerCall | Site]:
        """The calls that read groups whose units are uncorrelated."""
        names = getattr(self._graph, "uncorrelated", ())
        groups = (group for group in self._graph.groups if group.name in names)
        return frozenset(reader for group in groups for reader in self.readers(group))

    def read_by(self, reader: LayerCall | Site) -> Hashable:
        """Return a value that is equal for readers with equal columns."""
        if (
            isinstance(reader, Site) or self.program_calls.writes
        ):  # a node has two values if the program writes into it
            return reader
        found: Hashable = reader.reads(Call.captured(reader.node), self.tensor(reader.weight).to("meta"))
        return found

    def pairs(self, reader: LayerCall | Site) -> int:
        """Number of pairs of columns, over all parts of a grouped layer; of columns, if uncorrelated."""
        if isinstance(reader, Site):
            return len(reader.unit) ** 2
        matrix = reader.layer.matrix(self.tensor(reader.weight).to("meta"), Call.captured(reader.node))
        return int(matrix.shape[0] * matrix.shape[1] ** (1 if reader in self.uncorrelated else 2))


Show = Callable[[Tensor, Read, torch.Generator, Padding], None]
"""Gets a node's value, a function to read its inputs, a generator to choose positions, and the padding."""

Regression = tuple[Tensor, Tensor]
"""A weight matrix [columns, outputs], and the unit of each column, -1 for no unit. [columns]"""


class _Reading(ABC):
    """A reader of a group's units, seen as regressions whose columns belong to the units.

    Attributes:
        columns: The sums of its inputs.
        sums: All sums that it updates. `columns` is among them, unless another reading updates it.
    """

    columns: Columns
    sums: list[Columns | Ends]

    @abstractmethod
    def shows(self) -> list[tuple[str, Show]]:
        """Return names of nodes, each with the function that gets its value."""

    @abstractmethod
    def regressions(self, group: Group, covariance: Tensor) -> Iterator[tuple[int, Regression]]:
        """Yield the regressions that read units of a group, each with its part.

        They are scaled so that an error of one counts equally in all of them.

        Args:
            group: The group.
            covariance: The covariance of the columns. [parts, columns, columns]
        """


class _LayerReading(_Reading):
    """One call of a layer."""

    def __init__(
        self, layer: LayerCall, layers: _Layers, shared: dict[Hashable, Columns], views: int
    ) -> None:
        self._layer, self._layers = layer, layers
        self._call = Call.captured(layer.node)
        self._weight = layers.tensor(layer.weight).detach()
        self._addition = addition_after(layer, layers.program_calls)
        parts, columns, outputs = layer.layer.matrix(self._weight.to("meta"), self._call).shape
        device = data_device(self._weight.device)
        self._most = max(POSITIONS, columns // SHARE)
        self._ends = Ends(parts, outputs, device)
        self.sums = [self._ends]
        key = layers.read_by(layer)
        self._adds_columns = key not in shared
        if self._adds_columns:
            kind = Uncorrelated if layer in layers.uncorrelated else Columns
            shared[key] = kind(parts, columns, device, views)
            self.sums.append(shared[key])
        self.columns = shared[key]

    def shows(self) -> list[tuple[str, Show]]:
        """Read the columns at the layer, and the ends at the addition after it, or at the layer itself."""
        layer = self._layer

        def columns(value: Tensor, read: Read, drawn: torch.Generator, padding: Padding) -> None:
            both = read(layer.x).detach(), value
            for real, (x, y) in layer.pieces(self._call, self._weight, padding, *both):
                places = layer.draw(self._call, self._weight, y, self._most, drawn, real)
                found = layer.layer.columns(x, self._weight, self._call, places)
                self.columns.add(found, len(y) if y.ndim > 1 else 1, counted(real, places))

        def ends(value: Tensor, read: Read, drawn: torch.Generator, padding: Padding) -> None:
            for real, (y,) in layer.pieces(self._call, self._weight, padding, value):
                self._ends.add(layer.layer.targets(y, self._weight, self._call)[:, counted(real)])

        after = layer if self._addition is None else self._addition
        found: list[tuple[str, Show]] = [(after.node.name, ends)]
        return [(layer.node.name, columns), *found] if self._adds_columns else found

    def regressions(self, group: Group, covariance: Tensor) -> Iterator[tuple[int, Regression]]:
        """Yield the regressions of each slice of the group that belongs to the layer's weight."""
        matrix = self._layer.layer.matrix(self._weight, self._call).double()
        scaled = matrix * self._factor()[:, None] / (self._ends.variance() ** 0.5 or 1.0)
        for piece in group.of_role("consume"):
            if self._layer in self._layers.of(piece):
                entries = unit_of(piece, self._weight)
                unit = self._layer.layer.matrix(entries, self._call)[:, :, 0]
                for part in range(len(unit)):
                    if bool((unit[part] >= 0).any()):
                        yield part, (scaled[part], unit[part])

    def _factor(self) -> Tensor:
        """Return the factor of each output on the way to the addition. [parts, outputs]"""
        value = self._layer.node.meta["val"]
        shape = [hint(n) for n in value.shape]
        ends = []
        for start in (0.0, 1.0):
            at = torch.full(shape, start, dtype=value.dtype, device=self._weight.device)
            source = self._layer.node
            for node in () if self._addition is None else self._addition.chain:
                inputs = {n: self._layers.tensor(n).detach() for n in node.all_input_nodes if n is not source}
                inputs[source] = at
                call = Call.captured(node)
                at = call.run(*fx.map_arg(call.args, inputs.get), **fx.map_arg(call.kwargs, inputs.get))
                source = node
            ends.append(at)
        found = self._layer.layer.targets(ends[1] - ends[0], self._weight, self._call)
        return found[:, 0].double()


class _SiteReading(_Reading):
    """The activations at one site, as their own target: for groups that no layer reads."""

    def __init__(self, site: Site, device: torch.device, views: int) -> None:
        self._site = site
        self.columns = Columns(1, len(site.unit), device, views)
        self.sums = [self.columns]

    def shows(self) -> list[tuple[str, Show]]:
        """Read a row for each sample and position of the map."""

        def columns(value: Tensor, read: Read, drawn: torch.Generator, padding: Padding) -> None:
            rows, index = rows_at(self._site, value, padding)
            self.columns.add(rows, len(value) if self._site.axis else 1, index)

        return [(self._site.node, columns)]

    def regressions(self, group: Group, covariance: Tensor) -> Iterator[tuple[int, Regression]]:
        """Yield one regression, whose targets are the columns themselves."""
        whole = max(
            0.0, float(covariance[0].diagonal().sum())
        )  # rounding may make it negative for a constant
        wanted = torch.eye(covariance.shape[1]).to(covariance) / (whole**0.5 or 1.0)
        yield 0, (wanted, torch.as_tensor(self._site.unit, device=covariance.device))


class _ReconstructionTally(TensorTally):
    def __init__(self, context: Context) -> None:
        self.context = context
        layers = _Layers(context.graph, Reconstruction.name)
        made: dict[LayerCall | Site, _Reading] = {}
        shared: dict[Hashable, Columns] = {}
        self._readings: dict[str, list[_Reading]] = {}
        for group in context.graph.groups:
            for reader in layers.readers(group):
                if reader not in made:
                    made[reader] = (
                        _SiteReading(reader, data_device(context.graph.device), context.views)
                        if isinstance(reader, Site)
                        else _LayerReading(reader, layers, shared, context.views)
                    )
                self._readings.setdefault(group.name, []).append(made[reader])
        self._sums = [sums for reading in made.values() for sums in reading.sums]
        self._shows: dict[str, list[Show]] = {}
        for reading in made.values():
            for node, show in reading.shows():
                self._shows.setdefault(node, []).append(show)

    def calls(self) -> frozenset[str]:
        """Names of the layers, the additions after them, and the sites of groups that no layer reads."""
        return frozenset(self._shows)

    def call(self, node: str, value: Tensor, read: Read, step: Step) -> None:
        """Add the inputs and outputs of one of these nodes to the sums."""
        for show in self._shows[node]:
            drawn = torch.Generator().manual_seed(self.context.seed + step.index)
            show(value, read, drawn, step.padding)

    def held(self) -> dict[str, Tensor]:
        """Return all sums, named by number."""
        return {f"{k}.{name}": t for k, sums in enumerate(self._sums) for name, t in sums.state.items()}

    def finish(self) -> Mapping[str, Vector]:
        """Eliminate the units of each group."""
        apart: frozenset[str] = getattr(self.context.graph, "uncorrelated", frozenset())
        return {
            g.name: added_up(g.size, self._consumers(g))
            if g.name in apart
            else eliminate(g.size, [Consumer(*found) for found in self._consumers(g)])
            for g in self.context.graph.groups
        }

    def _consumers(self, group: Group) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield the arguments of a `Consumer` for each regression: scatter, weight, unit of each column.

        Layers with the same columns form one regression with more outputs.
        """
        by_columns: dict[Columns, list[_Reading]] = {}
        for reading in self._readings[group.name]:
            by_columns.setdefault(reading.columns, []).append(reading)
        for columns, readings in by_columns.items():
            covariance = columns.covariance()
            found: dict[Any, list[Regression]] = {}
            for reading in readings:
                for part, (weight, unit) in reading.regressions(group, covariance):
                    found.setdefault((part, *unit.tolist()), []).append((weight, unit))
            for (part, *_), same in found.items():
                yield covariance[part], torch.cat([w for w, _ in same], 1), same[0][1]
