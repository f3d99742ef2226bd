"""Score for all candidates at once, and skip signals that the data cannot provide."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from secateur.allocators.registry import Allocates
from secateur.calibration import Batch, Calibration
from secateur.errors import CalibrationError, ScoreError
from secateur.graph.graph import Graph
from secateur.pipeline.resuming import scored_once
from secateur.pipeline.targets.target import Scored
from secateur.signals import Scores
from secateur.signals.loss import LossFn
from secateur.signals.program import NotObservedError
from secateur.signals.registry import resolve
from secateur.signals.signal import Signal
from secateur.signals.units.combination import SignalLike, name_of


def score_candidates(
    rules: Iterable[Allocates],
    graph: Graph,
    model: nn.Module,
    data: Calibration,
    *,
    loss_fn: LossFn | None,
    seed: int,
    progress: bool,
) -> Scored:
    """Score all signals that the candidates need and the data can provide.

    Returns:
        The scores; and for each missing signal the reason.

    Raises:
        SecateurError: The data, the model or a setting is wrong; see `sc.score`.
    """
    wanted = {name_of(signal): signal for rule in rules for signal in rule.signals}
    first = data.first()
    missing = {}
    for name, signal in wanted.items():
        why = next(filter(None, (_lacking(leaf, graph, first, loss_fn) for leaf in resolve(signal))), None)
        if why is not None:
            missing[name] = why
    signals = [signal for name, signal in wanted.items() if name not in missing]
    if not signals:
        return Scored(Scores({}, fingerprint=graph.fingerprint), missing)

    def scores_of(some: Sequence[SignalLike]) -> Scores:
        return scored_once(graph, model, data, some, loss_fn=loss_fn, seed=seed, progress=progress)

    try:
        return Scored(scores_of(signals), missing)
    except NotObservedError:  # a signal cannot be observed at other input sizes: score one by one to find it
        values: dict[str, Any] = {}
        scores = Scores({}, fingerprint=graph.fingerprint)
        for signal in signals:
            try:
                scores = scores_of([signal])
                values |= scores.values
            except NotObservedError as error:
                missing[name_of(signal)] = str(error)
        return Scored(replace(scores, values=values), missing)


def _lacking(signal: Signal, graph: Graph, first: Batch, loss_fn: LossFn | None) -> str | None:
    """Return the reason why a signal cannot score this model with these data; None if it can.

    Class labels out of range are no such reason: scoring raises an error for them.
    """
    labels = first.labels
    classed = labels is not None and labels.ndim == 1 and not labels.is_floating_point()
    if "labels" in signal.needs and (not classed or loss_fn is not None or first.whole):
        try:
            first.classes()
        except CalibrationError as error:
            return f"signal {signal.name}: {error}"
    if signal.needs & {"gradients", "activation_gradients"} and first.labels is None and loss_fn is None:
        return f"signal {signal.name}: expected labels or loss_fn, got neither."
    try:
        signal.held(graph, 1)
    except ScoreError as error:  # a group that it cannot see
        return str(error)
    return None
