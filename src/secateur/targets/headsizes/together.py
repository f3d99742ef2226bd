"""Head sizes in `sc.trace`, with the channels, neurons and hidden units outside attention."""

from __future__ import annotations

from functools import wraps
from typing import Any

from secateur.graph.graph import Graph
from secateur.targets.headsizes import trace as alone


@wraps(alone.trace, assigned=())
def trace(*args: Any, **kwargs: Any) -> Graph:
    """Find the dimensions of attention heads that may go, and all units but whole heads.

    It takes what the trace of head sizes alone takes.

    Raises:
        NothingToPruneError: No dimension of a head may be removed.
    """
    graph = alone.trace(*args, **kwargs)
    return graph.restricted_to(graph.all_groups)
