"""What a model costs: parameters and MACs by counting."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """The analytic cost of one forward pass of one sample.

    Attributes:
        params: Parameters (buffers not counted; tied ones counted once).
        macs: Multiply-accumulate operations of convolutions, linear and recurrent layers and matrix
            products; half of what `torch.utils.flop_counter.FlopCounterMode` counts.
    """

    params: int
    macs: int
