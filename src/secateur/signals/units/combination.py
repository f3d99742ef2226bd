"""Signals made of other signals: products and sums of ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, TypeAlias

import numpy as np

from secateur.errors import ScoreError, SettingError
from secateur.signals.scores import Scores
from secateur.signals.signal import Signal, Vector


@dataclass(frozen=True, init=False)
class Combination(ABC):
    """A signal whose scores are computed from those of its parts, within each group.

    It needs everything that its parts need. A part that is also requested by itself is computed only once.

    Attributes:
        parts: Names, signals, or other combinations; at least two.
        name: The parts' names with the operator between them: ``magnitude*wasserstein``.

    Raises:
        SettingError: Fewer than two parts, or a part is none of these.
    """

    parts: tuple[SignalLike, ...]

    operator: ClassVar[str]

    def __init__(self, *parts: SignalLike) -> None:
        for part in parts:
            if not isinstance(part, str | Signal | Combination):
                raise SettingError(
                    f"{type(self).__name__}: expected names and instances of signals, got {part!r}. "
                    "Pass an instance, not a class."
                )
        if len(parts) < 2:
            raise SettingError(
                f"{type(self).__name__}: expected at least two signals, got {len(parts)}. Name more."
            )
        object.__setattr__(self, "parts", parts)

    @property
    def name(self) -> str:
        """The name of its scores."""
        return self.operator.join(map(self._name_of_part, self.parts))

    def _name_of_part(self, part: SignalLike) -> str:
        name = name_of(part)
        return f"({name})" if self.operator == "*" and "+" in name else name

    @abstractmethod
    def combine(self, scores: Sequence[Vector]) -> Vector:
        """One group's scores from those of the parts, all [group.size]."""


class Product(Combination):
    r"""The product of the parts' scores: worth little is what is worth little by any of them.

    .. math:: P_j = \prod_s \frac{x_{s,j}}{\frac{1}{N} \sum_i x_{s,i}}

    over the parts s, N being the number of units of the group. Dividing by the mean makes the scale of a part
    irrelevant. A part that is zero throughout a group says nothing about it and is left out there.

    Direction: as of its parts; higher is worth more. Their scores have to be 0 or more.

    Example:
        >>> Product("magnitude", "wasserstein").name
        'magnitude*wasserstein'
        >>> Product("a", "b").combine([np.array([1.0, 3.0]), np.array([40.0, 40.0])])
        array([0.5, 1.5])
    """

    operator: ClassVar[str] = "*"

    def combine(self, scores: Sequence[Vector]) -> Vector:
        """The product, each part over its mean."""
        result = np.ones_like(scores[0])
        for part, vector in zip(self.parts, scores, strict=True):
            if vector.min() < 0:
                raise ScoreError(
                    f"signal {self.name}: expected scores of 0 or more to multiply, got {vector.min()} from "
                    f"{name_of(part)}. Add ranks (+) instead."
                )
            if vector.any():
                # By the largest first: a mean of very large scores would overflow.
                vector = vector / vector.max()
                result *= vector / vector.mean()
        return result


class RankSum(Combination):
    r"""The mean of the units' ranks by each part: only the order counts, not how far apart scores are.

    .. math:: R_j = \frac{1}{S} \sum_{s=1}^S \frac{r_{s,j}}{N - 1}

    over the S parts, r being the rank from 0 to N − 1 among the N units of the group; equal scores share the
    mean of their ranks, so a part that is constant in a group says nothing about it.

    Direction: as of its parts; higher is worth more.

    Example:
        >>> RankSum("a", "b").combine([np.array([1.0, 3.0, 9.0]), np.array([7.0, 7.0, 0.0])])
        array([0.375, 0.625, 0.5  ])
    """

    operator: ClassVar[str] = "+"

    def combine(self, scores: Sequence[Vector]) -> Vector:
        """The mean of the ranks, each in [0, 1]."""
        span = max(len(scores[0]) - 1, 1)
        mean: Vector = np.mean([_mean_ranks(vector) / span for vector in scores], axis=0)
        return mean


SignalLike: TypeAlias = str | Signal | Combination
"""Anything that names a signal: a name (also ``a*b`` and ``a+b``), a signal, or a combination."""


def name_of(signal: SignalLike) -> str:
    """Return the name of a signal's scores."""
    return signal if isinstance(signal, str) else signal.name


def listed(signals: SignalLike | Iterable[SignalLike]) -> tuple[SignalLike, ...]:
    """Return one or several signals as a tuple."""
    return (signals,) if isinstance(signals, str | Signal | Combination) else tuple(signals)


def parse(signal: SignalLike) -> SignalLike:
    """Turn a name such as ``a*b+c`` into a combination (``*`` before ``+``); return others unchanged.

    Example:
        >>> parse("l1*wasserstein+taylor")
        RankSum(parts=(Product(parts=('l1', 'wasserstein')), 'taylor'))
    """
    if not isinstance(signal, str):
        return signal
    for kind in (RankSum, Product):
        parts = signal.split(kind.operator)
        if len(parts) > 1:
            return kind(*map(parse, parts))
    return signal


def with_combinations(scores: Scores, signals: Iterable[SignalLike]) -> Scores:
    """Add to the scores those of all requested combinations.

    Raises:
        ScoreError: A part was not scored, or cannot be multiplied.
    """
    values = dict(scores.values)
    for combination in map(parse, signals):
        if isinstance(combination, Combination):
            values[combination.name] = _scored(combination, scores)
    return replace(scores, values=values)


def _scored(signal: SignalLike, scores: Scores) -> Mapping[str, Vector]:
    signal = parse(signal)
    if not isinstance(signal, Combination):
        return scores[name_of(signal)]
    parts = [_scored(part, scores) for part in signal.parts]
    return {group: signal.combine([part[group] for part in parts]) for group in parts[0]}


def _mean_ranks(vector: Vector) -> Vector:
    """Return ranks from 0. Equal scores get the mean of their ranks."""
    _, place, counts = np.unique(vector, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    means: Vector = ends - (counts + 1) / 2
    return means[place]
