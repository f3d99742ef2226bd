"""Directions in `sc.score`: by the signals of units. The weakest directions of a layer are removed first."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import replace
from os import PathLike
from typing import Any

import numpy as np
from numpy.typing import NDArray

from secateur.calibration import Forward
from secateur.signals.loss import LossFn
from secateur.signals.scores import Scores
from secateur.signals.scoring import score as score_units
from secateur.signals.units.combination import SignalLike
from secateur.targets.lowrank.graph import RankGraph

CUMULATIVE = frozenset({"reconstruction"})
"""Signals whose score of a unit is the error after the unit and all units before it are removed."""


def score(
    graph: RankGraph,
    calibration: Any = None,
    signals: SignalLike | Iterable[SignalLike] = "reconstruction",
    *,
    loss_fn: LossFn | None = None,
    forward: Forward | None = None,
    seed: int = 0,
    progress: bool = True,
    memory: int | str | None = None,
    checkpoint: str | PathLike[str] | None = None,
    checkpoint_every: float = 60.0,
) -> Scores:
    """Score each direction by any signal of units: see `secateur.score`.

    The last unit of a group is all directions together that have to go before two layers save anything. So
    it is removed first: its score becomes the lowest of its group. Scores of ``reconstruction`` stay exact:
    those of the other directions include the error of the last unit.
    """
    found: Scores = inspect.unwrap(score_units)(
        graph,
        calibration,
        signals,
        loss_fn=loss_fn,
        forward=forward,
        seed=seed,
        progress=progress,
        memory=memory,
        checkpoint=checkpoint,
        checkpoint_every=checkpoint_every,
    )
    return replace(
        found,
        values={
            signal: _with_last_first(graph, by_group, cumulative=signal in CUMULATIVE)
            for signal, by_group in found.values.items()
        },
    )


def _with_last_first(
    graph: RankGraph, by_group: Mapping[str, NDArray[np.float64]], *, cumulative: bool
) -> dict[str, NDArray[np.float64]]:
    change = errors_with_last_first if cumulative else lowest_last
    return {
        name: change(values) if name in graph.uncorrelated else values for name, values in by_group.items()
    }


def lowest_last(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Replace the last score by the lowest one.

    Example:
        >>> lowest_last(np.array([3.0, 1.0, 2.0])).tolist()
        [3.0, 1.0, 1.0]
    """
    return np.append(values[:-1], values.min())


def errors_with_last_first(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Compute cumulative errors for another order of removal, in which the last unit is removed first.

    Args:
        values: The error after each unit and those with lower values are removed. Errors add up. [units]

    Example:
        >>> errors_with_last_first(np.array([7.0, 1.0, 3.0])).tolist()  # they add 4, 1 and 2
        [7.0, 3.0, 2.0]
    """
    order = np.argsort(values, kind="stable")
    added = np.empty_like(values)
    added[order] = np.diff(values[order], prepend=0.0)
    last = len(values) - 1
    order = np.concatenate([[last], order[order != last]])
    found = np.empty_like(values)
    found[order] = np.cumsum(added[order])
    return found
