"""Head sizes in `sc.trace`: the dimensions of attention heads alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from secateur.calibration.reading import Forward
from secateur.errors import NothingToPruneError
from secateur.graph.graph import Graph
from secateur.graph.trace import trace_units


def trace(
    model: nn.Module,
    example_inputs: Any,
    *,
    more_inputs: Iterable[Any] = (),
    methods: Iterable[str] = (),
    allow_inexact: bool = False,
    forward: Forward | None = None,
) -> Graph:
    """Find the dimensions of attention heads that may go, and nothing else: see `secateur.trace`.

    Raises:
        NothingToPruneError: No dimension of a head may be removed.
    """
    graph = trace_units(
        model,
        example_inputs,
        more_inputs=more_inputs,
        methods=methods,
        allow_inexact=allow_inexact,
        forward=forward,
        head_sizes=True,
    )
    if not graph.head_sizes:
        kept = [f"{left.group.name}: {left.reason}" for left in graph.left]
        raise NothingToPruneError(
            "trace: expected an attention whose heads can lose dimensions, got none. Channels, neurons and "
            f"whole heads are found with granularity='unit'. {'; '.join(kept[:3])}".rstrip()
        )
    return graph.restricted_to(graph.head_sizes)
