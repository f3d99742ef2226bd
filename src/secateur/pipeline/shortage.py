"""Find out whether there are enough calibration data to refit every layer by least squares."""

from __future__ import annotations

import math

from secateur.common.formatting import number
from secateur.graph.graph import Graph
from secateur.graph.nodes import hint
from secateur.repairs.regression.layers import Site
from secateur.repairs.regression.readers import LayerCalls
from secateur.stream.calls import Call

HELD = 1 / 5
"""The share of the data that is held out, which scores and repairs do not read."""


def shortage(graph: Graph, samples: int) -> str:
    """Name the layer with the fewest rows per input column, if it has less than one; else return "".

    Each position of a layer's output gives the regression one row. Positions of one sample depend on each
    other, so one row per column is the minimum, and more is better.

    Args:
        graph: The trace of the dense model.
        samples: Number of samples that scores and repairs read.
    """
    calls = LayerCalls(graph)
    sites = {
        site: calls.program_calls.names[site.weight].removesuffix(".weight")
        for group in graph.groups
        for piece in group.of_role("consume")
        for site in calls.of(piece)
    }
    found = [(*shape, name) for site, name in sites.items() if (shape := _shape(site, calls)) is not None]
    if not found:
        return ""
    columns, positions, name = max(found, key=lambda each: each[0] / each[1])
    if samples * positions >= columns:
        return ""
    wanted = math.ceil(math.ceil(columns / positions) / (1 - HELD))
    return (
        f"Few data: {samples:,} samples give the layer {name} {number(samples * positions)} rows for "
        f"{number(columns)} input columns. With {number(wanted)} samples, a fifth held out, it gets one each."
    )


def _shape(site: Site, calls: LayerCalls) -> tuple[int, int] | None:
    """Return the input columns, and the output positions of one sample; None if the data decide these."""
    weight = calls.tensor(site.weight).to("meta")
    call = Call.captured(site.node)
    try:
        size = [hint(n) for n in site.node.meta["val"].shape]
    except ValueError:
        return None
    positions = math.prod(size[1:]) // max(1, site.layer.outputs(weight, call))
    return int(site.layer.matrix(weight, call).shape[1]), max(1, positions)
