"""How large a mean may really be: confidence bounds for the mean of paired differences.

A difference is what one held-out sample says of two models. Where both are right or wrong, differences are
1, 0 and −1, and the bound comes from their exact distribution, which also holds for few samples and where
almost none of them differ. For other numbers it is an approximation: the larger of Student's, corrected for
skewness, and the tail of the distribution that is nearest to what was seen.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

LEAST = 30
"""Fewest samples for numbers other than 1, 0 and −1: below, their mean is not nearly normal."""

MOST = 30_000
"""Most samples for which the exact distribution is computed: above, the approximation is as good."""

_HALVINGS = 32


def upper_bound(differences: NDArray[np.float64], confidence: float = 0.95) -> float:
    """Return a number that the true mean is below, for that share of all draws of samples.

    Args:
        differences: One a sample. [samples]
        confidence: The share, in [0.5, 1).

    Returns:
        The bound. Infinity if a difference is not finite, or there are fewer than `LEAST` samples of other
        numbers than 1, 0 and −1.

    Example:
        >>> round(upper_bound(np.zeros(300)), 4)  # 300 samples, and no difference seen
        0.0099
    """
    if not len(differences) or not np.isfinite(differences).all():
        return math.inf
    if len(differences) <= MOST and np.isin(differences, (-1.0, 0.0, 1.0)).all():
        worse, better = int((differences > 0).sum()), int((differences < 0).sum())
        return _exact(worse, better, len(differences), 1 - confidence)
    if len(differences) < LEAST:
        return math.inf
    return max(_student(differences, confidence), _tilted(differences, confidence))


def interval(differences: NDArray[np.float64], confidence: float = 0.95) -> tuple[float, float]:
    """Return a number that the true mean is above and one that it is below, both at once."""
    each = (1 + confidence) / 2
    return -upper_bound(-differences, each), upper_bound(differences, each)


def samples_needed(drop: float, confidence: float = 0.95) -> int:
    """Return how many samples can show a drop to be within `drop` if none of them is worse.

    Example:
        >>> samples_needed(0.01), samples_needed(0.03)
        (299, 99)
    """
    return math.ceil(math.log(1 - confidence) / math.log(1 - drop))


def samples_for(differences: NDArray[np.float64], limit: float, confidence: float) -> float:
    """Return about how many samples would show that the mean is below `limit`, if it is what it seems to be.

    Infinity if it seems to be above.
    """
    gap = limit - float(differences.mean())
    if gap <= 0:
        return math.inf
    spread = float(differences.std())
    return max((NormalDist().inv_cdf(confidence) * spread / gap) ** 2, math.log(1 / (1 - confidence)) / limit)


def _exact(worse: int, better: int, samples: int, error: float) -> float:
    """The bound for differences of 1, 0 and −1.

    The smallest mean d for which (number of 1) − (number of −1) would be as small as seen, or smaller, with a
    probability of at most `error`. That probability is exact, for the most likely share of −1 given d. It
    depends little on that share. Source: Lloyd 2008, the estimated p-value for matched pairs; the share is
    that of Tango 1998.

    Args:
        worse: Samples with 1.
        better: Samples with −1.
        samples: All samples.
        error: One minus the confidence.
    """
    low, high = (worse - better) / samples, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        share = _likely(worse, better, samples, middle) if middle >= 0 else 0.0
        if middle < 0:  # the same, seen from the other side
            share = _likely(better, worse, samples, -middle) - middle
        if _tail(worse - better, samples, share + middle, share) <= error:
            high = middle
        else:
            low = middle
    return high


def _likely(worse: int, better: int, samples: int, mean: float) -> float:
    """The most likely share of −1, if the mean is `mean`, at least 0."""
    a = 2 * samples
    b = mean * (2 * samples - worse + better) - worse - better
    c = -better * mean * (1 - mean)
    return min(max((math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a), 0.0), (1 - mean) / 2)


def _tail(total: int, samples: int, worse: float, better: float) -> float:
    """P(sum of samples ≤ total), each 1 with probability `worse` and −1 with `better`.

    By the characteristic function, whose inverse Fourier transform is the exact distribution.
    """
    size = 1 << (2 * samples + 1).bit_length()
    wave = np.exp(-2j * np.pi * np.arange(size // 2 + 1) / size)
    with np.errstate(divide="ignore", invalid="ignore"):  # where the function is zero, so is its power
        of_one = np.log(1 - worse - better + worse * wave + better * wave.conj())
    chances = np.fft.irfft(np.nan_to_num(np.exp(samples * of_one)), size)
    below = chances[size - samples :].sum()  # of sums from -samples to -1, which come last
    return float(
        below + chances[: total + 1].sum() if total >= 0 else chances[size - samples : size + total + 1].sum()
    )


def _student(differences: NDArray[np.float64], confidence: float) -> float:
    """Student's bound with Johnson's correction for skewness.

    Nor is it closer to the mean than one unseen sample as bad as the worst allows, which may make a share of
    1 − error^(1/n) of all. Source: Johnson 1978, Modified t tests for asymmetrical populations.
    """
    samples = len(differences)
    mean, spread = float(differences.mean()), float(differences.std(ddof=1))
    unseen = -math.expm1(math.log1p(-confidence) / samples) * float(np.abs(differences).max())
    if spread == 0:
        return mean + unseen
    skew = float(((differences - mean) ** 3).mean()) / (6 * spread**2 * samples)
    width = _quantile(confidence, samples - 1) * spread / math.sqrt(samples)
    return mean + max(width + skew, unseen)


def _tilted(differences: NDArray[np.float64], confidence: float) -> float:
    """The bound by exponential tilting, which follows skewed and rare differences further than Student's.

    Of all distributions over the numbers that were seen, with a mean of d, the one nearest to them gives each
    x a weight in proportion to exp(t·x). The bound is the d for which a mean as small as seen has a
    probability of one minus the confidence, by the saddlepoint approximation. Source: Efron 1981,
    Nonparametric standard errors and confidence intervals; Lugannani and Rice 1980.
    """
    mean = float(differences.mean())
    centred = differences - mean
    spread, largest = float(centred.std()), float(centred.max())
    if spread == 0:
        return mean
    normal, root = NormalDist(), math.sqrt(len(differences))

    def chance(tilt: float) -> float:
        cumulant = math.log(float(np.exp(tilt * (centred - largest)).mean())) + tilt * largest
        w, u = -root * math.sqrt(max(2 * cumulant, 1e-300)), -tilt * root * spread
        return normal.cdf(w) + normal.pdf(w) * (1 / w - 1 / u)

    low, high = 0.0, 1 / spread
    while chance(high) > 1 - confidence and high * largest < 500:
        low, high = high, 2 * high
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if chance(middle) > 1 - confidence else (low, middle)
    weights = np.exp(high * (centred - largest))
    return mean + float((centred * weights).sum() / weights.sum())


def _quantile(confidence: float, freedom: int) -> float:
    """Quantile of Student's distribution, for 29 degrees of freedom or more, to four digits.

    Source: Abramowitz and Stegun 1964, 26.7.5.
    """
    z = NormalDist().inv_cdf(confidence)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    return z + first / freedom + second / freedom**2
