"""The signals that can be asked for by name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from secateur.errors import ScoreError
from secateur.signals.signal import Signal
from secateur.signals.units.activation import Activation
from secateur.signals.units.apoz import APoZ
from secateur.signals.units.batchnorm_scale import BatchNormScale
from secateur.signals.units.combination import Asked, Combination, listed, parse
from secateur.signals.units.fisher import Fisher
from secateur.signals.units.fluctuation import Fluctuation
from secateur.signals.units.geometric_median import GeometricMedian
from secateur.signals.units.magnitude import L1, L2, Magnitude
from secateur.signals.units.random import Random
from secateur.signals.units.rank import Rank
from secateur.signals.units.reconstruction import Reconstruction
from secateur.signals.units.snip import Snip
from secateur.signals.units.taylor import Taylor
from secateur.signals.units.taylor_sample import TaylorSample
from secateur.signals.units.wanda import Wanda
from secateur.signals.units.wasserstein import Wasserstein

SIGNALS: dict[str, type[Signal]] = {
    "wasserstein": Wasserstein,
    "taylor": Taylor,
    "magnitude": Magnitude,
    "l1": L1,
    "l2": L2,
    "batchnorm_scale": BatchNormScale,
    "geometric_median": GeometricMedian,
    "activation": Activation,
    "apoz": APoZ,
    "rank": Rank,
    "reconstruction": Reconstruction,
    "fluctuation": Fluctuation,
    "wanda": Wanda,
    "taylor_sample": TaylorSample,
    "fisher": Fisher,
    "snip": Snip,
    "random": Random,
}
"""A new signal is one file and one line here; the name is the class's own `name`."""


def resolve(signals: Asked | Iterable[Asked]) -> tuple[Signal, ...]:
    """What has to be gathered: names as instances with default settings, combinations as their parts.

    A signal that is asked for twice with the same settings, on its own and as a part for example, comes once.

    Raises:
        ScoreError: A name is unknown, stands for two different settings, or something is no signal.

    Example:
        >>> resolve(["taylor", Magnitude(p=1, roles=("produce",))])
        (Taylor(), Magnitude(p=1, roles=('produce',), combine='mean'))
        >>> resolve(["taylor*random", "taylor"])
        (Taylor(), Random())
    """
    found: dict[str, Signal] = {}
    for signal in (leaf for asked in listed(signals) for leaf in _leaves(asked)):
        if found.setdefault(signal.name, signal) != signal:
            raise ScoreError(
                f"signals: expected each name with one setting, got {signal.name!r} twice. Score twice, "
                "or give a subclass a name of its own."
            )
    if not found:
        raise ScoreError(f"signals: expected at least one of {', '.join(SIGNALS)}, got none. Name one.")
    return tuple(found.values())


def _leaves(asked: Asked) -> Iterator[Signal]:
    known = ", ".join(SIGNALS)
    asked = parse(asked)
    if isinstance(asked, Combination):
        for part in asked.parts:
            yield from _leaves(part)
    elif isinstance(asked, Signal):
        yield asked
    elif not isinstance(asked, str):
        raise ScoreError(
            f"signals: expected names ({known}) or instances of Signal, got {asked!r}. "
            "Pass an instance, not a class."
        )
    elif asked not in SIGNALS:
        raise ScoreError(
            f"signals: expected one of {known}, or such names with * or + between them, got {asked!r}. "
            "Name one, or pass a Signal."
        )
    else:
        yield SIGNALS[asked]()
