"""Signals that are asked for by name, where what is scored is no unit."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from secateur.calibration import Calibration, Forward
from secateur.errors import CalibrationError, ScoreError
from secateur.graph.groups import Group
from secateur.signals.scores import Scores
from secateur.signals.signal import Signal
from secateur.signals.units.combination import Combination, parse, with_combinations

S = TypeVar("S")


def leaves(asked: Iterable[Any], known: Mapping[str, type[S]], base: type[S]) -> dict[str, S]:
    """Return the signals that are asked for, or that what is asked for is made of, by name.

    Args:
        asked: Names, also ``a*b`` and ``a+b``, signals, or combinations.
        known: The signals that have names.
        base: The class of all signals of this kind.

    Raises:
        ScoreError: A name is unknown, or something is no such signal.
    """
    found: dict[str, S] = {}
    for one in map(parse, asked):
        if isinstance(one, Combination):
            found |= leaves(one.parts, known, base)
        elif isinstance(one, base):
            found[getattr(one, "name", "")] = one
        elif isinstance(one, str) and one in known:
            found.setdefault(one, known[one]())
        else:
            raise ScoreError(
                f"score: expected one of {', '.join(known)} or an instance of {base.__name__}, got {one!r}. "
                "Name one."
            )
    return found


def gathered(
    graph: Any,
    signals: Any,
    known: Mapping[str, type[Any]],
    base: type[Any],
    context: Any,
    needs: Iterable[str],
    calibration: Any,
    forward: Forward | None,
    look: Callable[[Calibration, Mapping[str, list[Any]]], int],
) -> Scores:
    """Start the signals that are asked for, let them see the data if one needs some, and finish them.

    Args:
        graph: What is scored.
        signals: One or several of what `leaves` takes.
        known: As for `leaves`.
        base: As for `leaves`.
        context: What a signal's `start` gets; its `seed` is noted.
        needs: All that signals may need.
        calibration: As for `sc.score`; None if there are none.
        forward: As for `sc.score`.
        look: Shows all data to the running signals, by what they need; returns the number of samples.

    Raises:
        ScoreError: A signal is unknown, or its scores are not finite.
        CalibrationError: A signal needs data, and there are none.
    """
    asked = [signals] if isinstance(signals, str | Signal | base | Combination) else list(signals)
    chosen = leaves(asked, known, base)
    tallies = {name: signal.start(context) for name, signal in chosen.items()}
    needing = {need: [tallies[n] for n, s in chosen.items() if need in s.needs] for need in needs}
    samples = 0
    if any(needing.values()):
        if calibration is None:
            names = ", ".join(n for n, s in chosen.items() if s.needs)
            raise CalibrationError(
                f"score: expected calibration data for {names}, got none. Pass at least one batch."
            )
        data = Calibration.of(calibration, seed=context.seed, forward=forward, model=graph.model)
        data = data.to(graph.device)
        samples = look(data, needing) // data.repeats
    values = {name: dict(tally.finish()) for name, tally in tallies.items()}
    scores = Scores(values, samples, 0, context.seed, graph.fingerprint)
    return with_combinations(scores, [a for a in asked if not isinstance(a, base)])


def drawn(groups: Iterable[Group], seed: int) -> dict[str, NDArray[np.float64]]:
    """Uniform random numbers in [0, 1) for each group, by the seed and the group's name. [group.size]"""
    return {
        group.name: np.random.default_rng([seed % 2**64, zlib.crc32(group.name.encode())]).random(group.size)
        for group in groups
    }
