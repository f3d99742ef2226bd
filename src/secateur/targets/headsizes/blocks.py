"""Head sizes in `sc.trace`, with all units but whole heads, and with residual blocks."""

from __future__ import annotations

from functools import wraps
from typing import Any

from torch import nn

from secateur.targets.blocks.trace import trace as trace_blocks
from secateur.targets.headsizes.together import trace as trace_units
from secateur.targets.together import blocks as alone
from secateur.targets.together.graph import Joined, joined


@wraps(alone.trace, assigned=())
def trace(model: nn.Module, example_inputs: Any, **options: Any) -> Joined:
    """Find the dimensions of attention heads that may go, all units but whole heads, and blocks.

    It takes what the trace of units and blocks takes.
    """
    units = trace_units(model, example_inputs, **options)
    of_blocks = {name: options[name] for name in ("more_inputs", "forward") if name in options}
    return joined(units, trace_blocks(model, example_inputs, **of_blocks))
