"""Whether calibration data give the layers enough rows for what is computed from them in closed form."""

from __future__ import annotations

import math

from secateur.common.formatting import number
from secateur.graph.graph import Graph
from secateur.graph.nodes import hint
from secateur.repairs.regression.layers import Site
from secateur.repairs.regression.readers import LayerCalls
from secateur.stream.calls import Call

HELD = 1 / 5
"""The part of the data that scores and repairs do not see."""


def shortage(graph: Graph, samples: int) -> str:
    """Say which layer gets fewest rows for its input columns, if it gets less than one each; else nothing.

    Each position of a layer's output is a row. Positions of one sample depend on each other, so one row for
    each column is the least, not plenty.

    Args:
        graph: The trace of the dense model.
        samples: How many samples scores and repairs see.
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
    """Input columns, and output positions of one sample; None where these depend on the data."""
    weight = calls.tensor(site.weight).to("meta")
    call = Call.captured(site.node)
    try:
        size = [hint(n) for n in site.node.meta["val"].shape]
    except ValueError:
        return None
    positions = math.prod(size[1:]) // max(1, site.layer.outputs(weight, call))
    return int(site.layer.matrix(weight, call).shape[1]), max(1, positions)
