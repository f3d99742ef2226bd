"""What a model costs by counting: parameters, MACs and bytes. What it costs in time is in `latency`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from secateur.common.models import named_tensors


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


def weight_bytes(model: nn.Module) -> int:
    """Bytes that the parameters and buffers take in memory, shared storage counted once.

    Example:
        >>> weight_bytes(nn.Linear(4, 8))  # 40 numbers of 4 bytes
        160
    """
    storages = {
        t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in named_tensors(model).values()
    }
    return sum(storages.values())
