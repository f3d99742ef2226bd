"""Score blocks or experts with signals that users name: what both have in common."""

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


def leaves(requested: Iterable[Any], known: Mapping[str, type[S]], base: type[S]) -> dict[str, S]:
    """Return the requested signals by name; for combinations, the signals that they consist of.

    Args:
        requested: Names, also ``a*b`` and ``a+b``, signals, or combinations.
        known: All signals of this kind, by name.
        base: Their base class.

    Raises:
        ScoreError: A name is unknown, or an entry is no signal of this kind.
    """
    found: dict[str, S] = {}
    for one in map(parse, requested):
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


def score_named(
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
    """Score with the requested signals: start them, show them the data if one needs it, and finish them.

    Args:
        graph: The graph to score.
        signals: One or several signals, as for `leaves`.
        known: As for `leaves`.
        base: As for `leaves`.
        context: The argument of each signal's `start`.
        needs: Everything that signals of this kind may need.
        calibration: As for `sc.score`; None if there are none.
        forward: As for `sc.score`.
        look: Shows all data to the tallies, given by what they need. Returns the number of samples.

    Raises:
        ScoreError: A signal is unknown, or its scores are not finite.
        CalibrationError: A signal needs data, and there are none.
    """
    requested = [signals] if isinstance(signals, str | Signal | base | Combination) else list(signals)
    chosen = leaves(requested, known, base)
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
    return with_combinations(scores, [a for a in requested if not isinstance(a, base)])


def drawn(groups: Iterable[Group], seed: int) -> dict[str, NDArray[np.float64]]:
    """Return uniform random numbers in [0, 1) for each group, from the seed and its name. [group.size]"""
    return {
        group.name: np.random.default_rng([seed % 2**64, zlib.crc32(group.name.encode())]).random(group.size)
        for group in groups
    }
