"""Repairs that rescale and shift each output, so that its mean and variance match the dense layer's.

Each function takes `Sums` that regress the dense output on the pruned output (without bias): one
regression per output channel, each with a single column. All return a `Fit` whose weight is the factor
and whose bias is the shift.

Common arguments:
    parts: Sums over parts of the calibration data; they are added up.
    factor: The factor before the repair, all ones. [outputs, 1, 1]
    bias: The bias before the repair, or None. [outputs, 1]
    intercept: Whether the layer has a bias that may change.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from secateur.repairs.regression.leastsquares import Fit, Sums, total


def mean(parts: Sequence[Sums], factor: Tensor, bias: Tensor | None, intercept: bool) -> Fit:
    """Change only the bias, so that the mean of each output equals the dense mean."""
    return _fit_with_factor(total(parts), factor, factor, bias, intercept)


def layerwise(parts: Sequence[Sums], factor: Tensor, bias: Tensor | None, intercept: bool) -> Fit:
    """Scale the whole layer by one factor: sqrt(sum of dense variances / sum of pruned variances).

    Source: the layer-wise repair that arXiv 2605.21426 compares with (REFLOW: one scale per layer).
    """
    sums = total(parts)
    own, _ = sums.centred(intercept)
    gain = (sums.scatter(intercept) / own.sum()).sqrt()
    return _fit_with_factor(
        sums, factor * torch.where(torch.isfinite(gain) & (gain > 0), gain, 1.0), factor, bias, intercept
    )


def channelwise(parts: Sequence[Sums], factor: Tensor, bias: Tensor | None, intercept: bool) -> Fit:
    """Scale each output by sqrt(dense variance / pruned variance).

    An output that is constant after pruning keeps factor 1. Source: REPAIR (arXiv 2211.08403).
    """
    sums = total(parts)
    own, _ = (scatter[:, 0] for scatter in sums.centred(intercept))
    wanted = sums.yy - sums.y.square() / sums.count if intercept else sums.yy
    gain = (wanted.clamp_min(0) / own).sqrt()[:, :, None]
    return _fit_with_factor(
        sums, factor * torch.where(torch.isfinite(gain), gain, 1.0), factor, bias, intercept
    )


def variance(parts: Sequence[Sums], factor: Tensor, bias: Tensor | None, intercept: bool) -> Fit:
    """Scale each output by ``1 + r^2 (g - 1)``.

    ``g = sqrt(dense variance / pruned variance)`` is the factor that restores the variance. ``r`` is the
    correlation of dense and pruned output (0 if negative), so ``r^2`` is the share of the pruned output
    that is signal. An output that kept its signal gets its dense variance back. An output that is mostly
    error is not amplified.

    Source: variance matching is REPAIR (arXiv 2211.08403). ASR (arXiv 2605.21426) found that corrections
    must shrink where a channel's signal is weak. Departure: ASR shrinks by the channel's variance after
    pruning; here the shrinkage also depends on how much of that variance is signal.
    """
    sums = total(parts)
    own, both = (scatter[:, 0] for scatter in sums.centred(intercept))  # one column and one output each
    wanted = sums.yy - sums.y.square() / sums.count if intercept else sums.yy
    gain = (wanted / own).sqrt()
    signal = (both.clamp_min(0).square() / (own * wanted)).clamp_max(1)
    shrunk = torch.where(torch.isfinite(gain * signal), 1 + signal * (gain - 1), 1.0)
    return _fit_with_factor(sums, factor * shrunk[:, :, None], factor, bias, intercept)


def _fit_with_factor(sums: Sums, factor: Tensor, old: Tensor, bias: Tensor | None, intercept: bool) -> Fit:
    """Build the fit for new factors: choose the best shift, and compute the error before and after.

    Args:
        sums: Sums over all data.
        factor: The new factors. [outputs, 1, 1]
        old: The factors before. [outputs, 1, 1]
        bias: The bias before.
        intercept: Whether the bias may change.
    """
    target = sums.scatter(intercept) or 1.0
    new = sums.intercept(factor) if intercept else bias
    before, after = (sums.loss(f, b) / target for f, b in ((old, bias), (factor, new)))
    return Fit(factor, new, float("inf"), before, after)
