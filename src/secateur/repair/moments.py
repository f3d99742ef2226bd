"""Mean and variance of each output made what they were, by a shift and a factor.

All read sums over one column for each output: what the layer gives now, without its bias.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from secateur.regression.leastsquares import Fit, Sums, total


def mean(parts: Sequence[Sums], factor: Tensor, bias: Tensor | None, intercept: bool) -> Fit:
    """The bias that makes the mean of each output the dense one's."""
    return _set(total(parts), factor, factor, bias, intercept)


def layerwise(parts: Sequence[Sums], factor: Tensor, bias: Tensor | None, intercept: bool) -> Fit:
    """One factor for the whole layer: the root of the dense outputs' summed variance over the pruned ones'.

    Source: as in the layer-wise repair that arXiv 2605.21426 compares with (REFLOW's scale a layer).
    """
    sums = total(parts)
    own, _ = sums.centred(intercept)
    gain = (sums.scatter(intercept) / own.sum()).sqrt()
    return _set(
        sums, factor * torch.where(torch.isfinite(gain) & (gain > 0), gain, 1.0), factor, bias, intercept
    )


def channelwise(parts: Sequence[Sums], factor: Tensor, bias: Tensor | None, intercept: bool) -> Fit:
    """A factor for each output: the root of the dense output's variance over the pruned one's.

    Where the pruned output is constant, it stays so. Source: REPAIR (arXiv 2211.08403).
    """
    sums = total(parts)
    own, _ = (scatter[:, 0] for scatter in sums.centred(intercept))
    wanted = sums.yy - sums.y.square() / sums.count if intercept else sums.yy
    gain = (wanted.clamp_min(0) / own).sqrt()[:, :, None]
    return _set(sums, factor * torch.where(torch.isfinite(gain), gain, 1.0), factor, bias, intercept)


def variance(parts: Sequence[Sums], factor: Tensor, bias: Tensor | None, intercept: bool) -> Fit:
    """A factor for each output: ``1 + r^2 (g - 1)``.

    g is the root of the dense output's variance over the pruned one's, which matches the variance, and r
    the correlation of the two (0 if it is negative): r^2 is the share of the pruned output that is signal.
    An output that has kept its signal gets its variance back; one that is mostly damage is not amplified,
    whatever its variance.

    Source: variance matching as in REPAIR (arXiv 2211.08403); that corrections have to shrink where a
    channel's signal is weak is the finding of ASR (arXiv 2605.21426). The shrinkage is ours: theirs is a
    rule on the channel's variance after pruning, ours also sees whether that variance is signal.
    """
    sums = total(parts)
    own, both = (scatter[:, 0] for scatter in sums.centred(intercept))  # one column and one output each
    wanted = sums.yy - sums.y.square() / sums.count if intercept else sums.yy
    gain = (wanted / own).sqrt()
    signal = (both.clamp_min(0).square() / (own * wanted)).clamp_max(1)
    shrunk = torch.where(torch.isfinite(gain * signal), 1 + signal * (gain - 1), 1.0)
    return _set(sums, factor * shrunk[:, :, None], factor, bias, intercept)


def _set(sums: Sums, factor: Tensor, old: Tensor, bias: Tensor | None, intercept: bool) -> Fit:
    target = sums.scatter(intercept) or 1.0
    new = sums.intercept(factor) if intercept else bias
    before, after = (sums.loss(f, b) / target for f, b in ((old, bias), (factor, new)))
    return Fit(factor, new, float("inf"), before, after)
