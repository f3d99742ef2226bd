"""How much of the damage that a group's units leave behind repair cannot undo, measured without labels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from secateur.allocate.distortion import GRID, Distortion, Moments
from secateur.allocate.ranking import ranks
from secateur.allocate.repairability import Repairability
from secateur.allocate.signals import ScoreTable, table, vector
from secateur.calibration import Calibration, seeded
from secateur.errors import ScoreError
from secateur.graph.graph import Graph
from secateur.graph.groups import Slice
from secateur.regression.calls import Call
from secateur.regression.layers import Site
from secateur.regression.readers import LayerCalls, unit_of
from secateur.score.combination import Asked
from secateur.score.program import CapturedModel
from secateur.score.scores import Scores


@dataclass(frozen=True, eq=False)
class _Reader:
    """A call of a layer that reads a group.

    Attributes:
        group: The group's name.
        site: The call.
        call: The same, with its arguments.
        goes: For each entry of its weight, the place at which its unit goes; the group's size for entries
            of no unit. Of the weight's shape.
    """

    group: str
    site: Site
    call: Call
    goes: Tensor

    def output(self, pruned: Tensor, weight: Tensor, args: Any, kwargs: Any) -> Tensor:
        """What the call gives with another weight. [positions, outputs]"""
        swapped = [pruned if value is weight else value for value in args]
        return self.rows(self.call.run(*swapped, **kwargs), weight)

    def rows(self, output: Tensor, weight: Tensor) -> Tensor:
        """An output as [positions, outputs]."""
        return self.site.layer.targets(output, weight, self.call).movedim(0, 1).flatten(1)


def unit_distortions(
    graph: Graph,
    calibration: Any,
    scores: Scores | ScoreTable,
    signal: Asked,
    *,
    grid: Sequence[float] = GRID,
    progress: bool = True,
) -> dict[str, Distortion]:
    r"""For each group alone, the distortion of what reads it as its units go, before and after matching.

    With k of a group's units gone, those with the lowest scores, a layer c that reads the group gives
    :math:`z_c` where it gave :math:`y_c`; everything else is as in the dense model. The group's distortion is
    the mean over these layers of :math:`\lVert z_c - y_c \rVert^2 / \lVert y_c \rVert^2`, once of :math:`z_c`
    itself and once of :math:`z_c` with each output's mean and variance matched to those of :math:`y_c`. One
    pass over the data for all groups and counts, which runs each layer once for each group that it reads and
    each point of the curve.

    Readers that are no layers, the recurrent weights of an LSTM for instance, do not count.

    Args:
        graph: The trace.
        calibration: What `Calibration.of` takes; labels are not read.
        scores: Of at least `signal`.
        signal: The signal whose lowest scores go first.
        grid: Fractions of the units that are gone, ascending, from 0 to 1; rounded to whole units.
        progress: Show a bar on a terminal.

    Returns:
        By group. Groups that no layer reads have no curve.

    Raises:
        ScoreError: A group was not scored, or a value is not finite.
        CalibrationError: There is no data.
    """
    values = table(scores, graph, (signal,))
    places = {g.name: torch.from_numpy(ranks(vector(values, signal, g))) for g in graph.groups}
    counts = {g.name: np.unique([round(s * g.size) for s in grid]) for g in graph.groups}
    readers = _readers(graph, places)
    sums: dict[tuple[str, fx.Node], Moments] = {}

    def see(name: str, output: Tensor, read: Any) -> None:
        for reader in readers[name]:
            weight = read(reader.site.weight)
            args: Any = fx.map_arg(reader.call.args, read)
            kwargs: Any = fx.map_arg(reader.call.kwargs, read)
            gone = _pruned(weight, reader.goes, counts[reader.group])
            found = Moments.of(
                reader.rows(output, weight), (reader.output(w, weight, args, kwargs) for w in gone)
            )
            key = (reader.group, reader.site.node)
            sums[key] = sums[key] + found if key in sums else found

    model = CapturedModel(graph.programs)
    model.watch(readers, see)
    with seeded(0), torch.no_grad():
        data = Calibration.of(calibration, model=graph.programs.model).to(graph.device)
        for batch in data.batches("Measuring repairability", progress):
            batch.run(model)
    return {
        group.name: _mean(
            [
                s.distortion((counts[group.name] / group.size).tolist())
                for (name, _), s in sums.items()
                if name == group.name
            ],
            group.name,
        )
        for group in graph.groups
        if any(name == group.name for name, _ in sums)
    }


def with_unit_curves(
    rule: Any, graph: Graph, data: Any, scores: Scores | ScoreTable, *, progress: bool = False
) -> Any:
    """The rule, with the curves that `Repairability` needs, measured if it has none; any other as it is."""
    if not isinstance(rule, Repairability) or rule.curves is not None:
        return rule
    return replace(rule, curves=unit_distortions(graph, data, scores, rule.removal, progress=progress))


def _readers(graph: Graph, places: Mapping[str, Tensor]) -> dict[str, list[_Reader]]:
    """For each node that is a layer's call, the groups that it reads."""
    calls = LayerCalls(graph)
    found: dict[str, list[_Reader]] = {}
    for group in graph.groups:
        by_site: dict[Site, Tensor] = {}
        for piece in group.of_role("consume"):
            for site in calls.of(piece):
                goes = _goes(piece, places[group.name], calls.tensor(site.weight))
                earlier = by_site.get(site)
                by_site[site] = goes if earlier is None else torch.minimum(earlier, goes)
        for site, goes in by_site.items():
            reader = _Reader(group.name, site, Call.captured(site.node), goes)
            found.setdefault(site.node.name, []).append(reader)
    return found


def _goes(piece: Slice, places: Tensor, weight: Tensor) -> Tensor:
    """The place of each entry's unit; that after the last for entries of no unit. Of the weight's shape."""
    last = torch.tensor([len(places)])
    return torch.cat([places, last]).to(weight.device)[unit_of(piece, weight)]


def _pruned(weight: Tensor, goes: Tensor, counts: NDArray[np.int64]) -> Iterator[Tensor]:
    """The weight without what it multiplies the first units with, for each count of them."""
    for count in counts.tolist():
        yield torch.where(goes >= count, weight, 0)


def _mean(curves: Sequence[Distortion], group: str) -> Distortion:
    """Of the curves of all that read a group."""
    raw, repaired = (np.mean([getattr(c, k) for c in curves], 0) for k in ("raw", "repaired"))
    if not (np.isfinite(raw).all() and np.isfinite(repaired).all()):
        raise ScoreError(
            f"unit_distortions: expected finite outputs of what reads {group!r}, got NaN or infinity. "
            "Check the weights and the data."
        )
    whole = float(np.mean([c.whole for c in curves if c.whole is not None]))
    return Distortion(curves[0].sparsity, raw, repaired, whole, len(curves))
