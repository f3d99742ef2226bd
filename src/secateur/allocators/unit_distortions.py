"""Measure, without labels, how removing units changes the layers that read them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from secateur.allocators.distortion import GRID, Distortion, Moments
from secateur.allocators.ranking import ranks
from secateur.allocators.repairability import Repairability
from secateur.allocators.signals import ScoreTable, table, vector
from secateur.calibration import Calibration, seeded
from secateur.errors import ScoreError
from secateur.graph.graph import Graph
from secateur.graph.groups import Slice
from secateur.repairs.regression.layers import Site
from secateur.repairs.regression.readers import LayerCalls, unit_of
from secateur.signals.program import CapturedModel
from secateur.signals.scores import Scores
from secateur.signals.units.combination import SignalLike
from secateur.stream.calls import Call


@dataclass(frozen=True, eq=False)
class _Reader:
    """One call of a layer that reads the units of a group.

    Attributes:
        group: The group's name.
        site: The call.
        call: The arguments of the call.
        place: For each entry of the layer's weight, the position in the removal order of the unit that it
            multiplies; the group's size for entries that multiply no unit of the group. Of the weight's
            shape.
    """

    group: str
    site: Site
    call: Call
    place: Tensor

    def output(self, pruned: Tensor, weight: Tensor, args: Any, kwargs: Any) -> Tensor:
        """Run the call with the weight `pruned` in place of `weight`. [positions, outputs]"""
        swapped = [pruned if value is weight else value for value in args]
        return self.rows(self.call.run(*swapped, **kwargs), weight)

    def rows(self, output: Tensor, weight: Tensor) -> Tensor:
        """Reshape an output of the call to [positions, outputs]."""
        return self.site.layer.targets(output, weight, self.call).movedim(0, 1).flatten(1)


def unit_distortions(
    graph: Graph,
    calibration: Any,
    scores: Scores | ScoreTable,
    signal: SignalLike,
    *,
    grid: Sequence[float] = GRID,
    progress: bool = True,
) -> dict[str, Distortion]:
    r"""Measure the distortion curve of each group: how its readers change as its units are removed.

    Each group is pruned alone; everything else is as in the dense model. Remove the k units of a group with
    the lowest scores. A layer c that reads the group then returns :math:`z_c` instead of :math:`y_c`. The
    distortion is the mean over these layers of :math:`\lVert z_c - y_c \rVert^2 / \lVert y_c \rVert^2`. After
    repair means: with each output's mean and variance in :math:`z_c` matched to those of :math:`y_c`.

    One pass over the data measures all groups. In it, each layer runs once for each group that it reads and
    for each point of the curve. Only linear layers and convolutions count as readers, not, for example, the
    recurrent weights of an LSTM.

    Args:
        graph: The traced model.
        calibration: Anything that `Calibration.of` takes. Labels are not read.
        scores: Scores of at least `signal`.
        signal: The signal whose lowest scores are removed first.
        grid: Fractions of the units to remove, ascending, from 0 to 1. They are rounded to whole units.
        progress: Show a progress bar on a terminal.

    Returns:
        The curve of each group, by name. A group that no layer reads has no curve.

    Raises:
        ScoreError: A group has no scores, or a value is not finite.
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
            pruned = _pruned(weight, reader.place, counts[reader.group])
            found = Moments.of(
                reader.rows(output, weight), (reader.output(w, weight, args, kwargs) for w in pruned)
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
    """Measure the distortion curves for a `Repairability` allocator that has none.

    Returns:
        The allocator with its curves. Any other allocator is returned unchanged.
    """
    if not isinstance(rule, Repairability) or rule.curves is not None:
        return rule
    return replace(rule, curves=unit_distortions(graph, data, scores, rule.removal, progress=progress))


def _readers(graph: Graph, places: Mapping[str, Tensor]) -> dict[str, list[_Reader]]:
    """For each call of a layer, by the name of its node, one reader for each group that it reads."""
    calls = LayerCalls(graph)
    found: dict[str, list[_Reader]] = {}
    for group in graph.groups:
        by_site: dict[Site, Tensor] = {}
        for piece in group.of_role("consume"):
            for site in calls.of(piece):
                place = _place_of_entries(piece, places[group.name], calls.tensor(site.weight))
                earlier = by_site.get(site)
                by_site[site] = place if earlier is None else torch.minimum(earlier, place)
        for site, place in by_site.items():
            reader = _Reader(group.name, site, Call.captured(site.node), place)
            found.setdefault(site.node.name, []).append(reader)
    return found


def _place_of_entries(piece: Slice, places: Tensor, weight: Tensor) -> Tensor:
    """Position in the removal order of the unit that each weight entry multiplies. Of the weight's shape.

    Entries that multiply no unit get the number of units, so they are never removed.
    """
    last = torch.tensor([len(places)])
    return torch.cat([places, last]).to(weight.device)[unit_of(piece, weight)]


def _pruned(weight: Tensor, place: Tensor, counts: NDArray[np.int64]) -> Iterator[Tensor]:
    """Yield the weight for each count, with zeros in the entries that multiply the first `count` units."""
    for count in counts.tolist():
        yield torch.where(place >= count, weight, 0)


def _mean(curves: Sequence[Distortion], group: str) -> Distortion:
    """The mean of the curves of all layers that read a group."""
    raw, repaired = (np.mean([getattr(c, k) for c in curves], 0) for k in ("raw", "repaired"))
    if not (np.isfinite(raw).all() and np.isfinite(repaired).all()):
        raise ScoreError(
            f"unit_distortions: expected finite outputs of what reads {group!r}, got NaN or infinity. "
            "Check the weights and the data."
        )
    whole = float(np.mean([c.whole for c in curves if c.whole is not None]))
    return Distortion(curves[0].sparsity, raw, repaired, whole, len(curves))
