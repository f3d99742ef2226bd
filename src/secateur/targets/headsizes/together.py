"""Head sizes in `sc.trace`, with the channels, neurons and hidden units outside attention."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from secateur.calibration.reading import Forward
from secateur.graph.graph import Graph
from secateur.targets.headsizes import trace as alone


def trace(
    model: nn.Module,
    example_inputs: Any,
    *,
    more_inputs: Iterable[Any] = (),
    methods: Iterable[str] = (),
    allow_inexact: bool = False,
    forward: Forward | None = None,
) -> Graph:
    """Find the dimensions of attention heads that may go, and all units but whole heads.

    Raises:
        NothingToPruneError: No dimension of a head may be removed.
    """
    graph = alone.trace(
        model,
        example_inputs,
        more_inputs=more_inputs,
        methods=methods,
        allow_inexact=allow_inexact,
        forward=forward,
    )
    return graph.restricted_to(graph.all_groups)
