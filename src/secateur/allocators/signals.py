"""Check scores before an allocator uses them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from secateur.allocators.naming import shorten
from secateur.errors import ScoreError
from secateur.graph.groups import Group
from secateur.signals.scores import Scores
from secateur.signals.units.combination import SignalLike, name_of, with_combinations

if TYPE_CHECKING:
    from secateur.graph.graph import Graph

ScoreTable: TypeAlias = Mapping[str, Mapping[str, NDArray[np.float64]]]
"""Signal name -> group name -> one value for each unit [group.size]. Higher is worth more."""


def table(scores: Scores | ScoreTable, graph: Graph, signals: Iterable[SignalLike] = ()) -> ScoreTable:
    """Return scores as a plain mapping.

    Args:
        scores: The result of `sc.score`, or such a mapping made by the user.
        graph: The model that the scores must belong to.
        signals: Signals that are needed. Combinations that are missing are computed from their parts.

    Raises:
        ScoreError: The scores are of another model, or of another type.
    """
    if isinstance(scores, Scores):
        scores.check(graph)
        return with_combinations(scores, (s for s in signals if name_of(s) not in scores)).values
    if isinstance(scores, Mapping):
        return scores
    raise ScoreError(
        f"allocate: expected scores as sc.score gives them, or a mapping from signal to group to vector, "
        f"got {type(scores).__name__}. Pass one of these."
    )


def vector(scores: ScoreTable, signal_like: SignalLike, group: Group) -> NDArray[np.float64]:
    """Return one signal's scores of one group, checked. float64 [group.size]

    Raises:
        ScoreError: The signal or the group has no scores, or the scores are not one finite number for each
            unit.
    """
    signal = name_of(signal_like)
    if signal not in scores:
        raise ScoreError(
            f"allocate: expected scores of signal {signal!r}, got only {shorten(scores)}. "
            f"Score it too, or name another signal."
        )
    where = f"allocate: signal {signal!r}, group {group.name!r}"
    by_group = scores[signal]
    if group.name not in by_group:
        raise ScoreError(f"{where}: expected scores, got none. Score the graph that is to be pruned.")
    values = np.asarray(by_group[group.name], dtype=np.float64)
    if values.shape != (group.size,):
        raise ScoreError(
            f"{where}: expected shape ({group.size},), one score per unit, got {values.shape}. "
            "Score the graph that is to be pruned."
        )
    wrong = np.flatnonzero(~np.isfinite(values))
    if wrong.size:
        raise ScoreError(
            f"{where}: expected finite scores, got {values[wrong[0]]} for unit {wrong[0]} "
            f"({wrong.size} in all). Check the weights and the calibration data for NaN and infinity."
        )
    return values
