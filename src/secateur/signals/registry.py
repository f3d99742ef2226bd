"""The signals by name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from secateur.errors import ScoreError
from secateur.signals.signal import Signal
from secateur.signals.units.activation import Activation
from secateur.signals.units.apoz import APoZ
from secateur.signals.units.batchnorm_scale import BatchNormScale
from secateur.signals.units.combination import Combination, SignalLike, listed, parse
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


def resolve(signals: SignalLike | Iterable[SignalLike]) -> tuple[Signal, ...]:
    """What has to be gathered: names as instances with default settings, combinations as their parts.

    A signal that occurs twice with the same settings, for example by itself and as a part, is returned once.

    Raises:
        ScoreError: A name is unknown, stands for two different settings, or something is no signal.

    Example:
        >>> resolve(["taylor", Magnitude(p=1, roles=("produce",))])
        (Taylor(), Magnitude(p=1, roles=('produce',), combine='mean'))
        >>> resolve(["taylor*random", "taylor"])
        (Taylor(), Random())
    """
    found: dict[str, Signal] = {}
    for signal in (leaf for one in listed(signals) for leaf in _leaves(one)):
        if found.setdefault(signal.name, signal) != signal:
            raise ScoreError(
                f"signals: expected each name with one setting, got {signal.name!r} twice. Score twice, "
                "or give a subclass a name of its own."
            )
    if not found:
        raise ScoreError(f"signals: expected at least one of {', '.join(SIGNALS)}, got none. Name one.")
    return tuple(found.values())


def _leaves(signal: SignalLike) -> Iterator[Signal]:
    known = ", ".join(SIGNALS)
    signal = parse(signal)
    if isinstance(signal, Combination):
        for part in signal.parts:
            yield from _leaves(part)
    elif isinstance(signal, Signal):
        yield signal
    elif not isinstance(signal, str):
        raise ScoreError(
            f"signals: expected names ({known}) or instances of Signal, got {signal!r}. "
            "Pass an instance, not a class."
        )
    elif signal not in SIGNALS:
        raise ScoreError(
            f"signals: expected one of {known}, or such names with * or + between them, got {signal!r}. "
            "Name one, or pass a Signal."
        )
    else:
        yield SIGNALS[signal]()
