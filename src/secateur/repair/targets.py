"""What a layer of the pruned program should give.

The dense program's output, as a rule. Where that goes into an addition whose other operand is there
already, what the sum should be is known, and so is what the pruned program will add: the difference is
the target. So each addition of a residual stream corrects what went wrong in the stream before it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.regression.additions import Addition
from secateur.regression.layers import Site
from secateur.repair.pairs import Pair, Values

_FAINT = 1e-3
"""Channels whose factor on the way to the addition is smaller than this, relative to the largest, keep
their plain target: to correct a sum through them would take huge weights."""


@torch.no_grad()
def target(site: Site, addition: Addition | None, pair: Pair, values: Values) -> Tensor:
    """What the layer should give for one batch, at the kept positions, in the shape of its output."""
    wanted: Tensor = pair.dense_value(site.node, values)
    if addition is None:
        return wanted
    zero = torch.zeros_like(wanted[:1])
    shift = pair.run_chain(addition.chain, site.node, zero, dense=False)
    factor = pair.run_chain(addition.chain, site.node, zero + 1, dense=False) - shift
    drift = pair.dense_value(addition.other, values) - pair.small_value(addition.other, values)
    if addition.chain:
        into = pair.run_chain(addition.chain, site.node, wanted, dense=True)
        corrected = (into + drift - shift) / factor
    else:
        corrected = wanted + drift
    return torch.where(factor.abs() > _FAINT * factor.abs().max(), corrected, wanted)
