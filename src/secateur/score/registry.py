"""The signals that can be asked for by name."""

from __future__ import annotations

from collections.abc import Iterable

from secateur.errors import ScoreError
from secateur.score.magnitude import Magnitude
from secateur.score.signal import Signal
from secateur.score.taylor import Taylor
from secateur.score.wasserstein import Wasserstein

SIGNALS: dict[str, type[Signal]] = {
    "wasserstein": Wasserstein,
    "taylor": Taylor,
    "magnitude": Magnitude,
}
"""A new signal is one file and one line here; the name is the class's own `name`."""


def resolve(signals: str | Signal | Iterable[str | Signal]) -> tuple[Signal, ...]:
    """Names and instances as instances, with default settings for names.

    Raises:
        ScoreError: A name is unknown, is given twice, or something is no signal.

    Example:
        >>> resolve(["taylor", Magnitude(p=1)])
        (Taylor(), Magnitude(p=1, roles=('produce', 'consume')))
    """
    if isinstance(signals, str | Signal):
        signals = (signals,)
    known = ", ".join(SIGNALS)
    found: dict[str, Signal] = {}
    for given in signals:
        if isinstance(given, str):
            if given not in SIGNALS:
                raise ScoreError(
                    f"signals: expected one of {known}, got {given!r}. Do name one, or pass a Signal."
                )
            signal = SIGNALS[given]()
        elif isinstance(given, Signal):
            signal = given
        else:
            raise ScoreError(
                f"signals: expected names ({known}) or instances of Signal, got {given!r}. "
                "Do pass an instance, not a class."
            )
        if signal.name in found:
            raise ScoreError(
                f"signals: expected each name once, got {signal.name!r} twice. Do score twice, or give a "
                "subclass a name of its own."
            )
        found[signal.name] = signal
    if not found:
        raise ScoreError(f"signals: expected at least one of {known}, got none. Do name one.")
    return tuple(found.values())
