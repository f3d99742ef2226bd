"""The verb of this room: `score`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from secateur.calibration import Calibration
from secateur.graph.graph import Graph
from secateur.score.gather import gather
from secateur.score.loss import LossFn
from secateur.score.registry import resolve
from secateur.score.scores import Scores
from secateur.score.signal import Signal


def score(
    graph: Graph,
    calibration: Any = None,
    signals: str | Signal | Iterable[str | Signal] = ("wasserstein", "taylor"),
    *,
    loss_fn: LossFn | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Scores:
    """Say what each unit is worth, by every signal asked for, in one pass over the data.

    The model comes back bitwise as it was: parameters, buffers, gradients, training flags, hooks and random
    state, also after an exception. It is scored in evaluation mode, as it was captured.

    Args:
        graph: From `sc.trace`.
        calibration: A DataLoader, Dataset or iterable of batches (see `Calibration.of`); None if no signal
            needs data. Batches are moved to the model's device.
        signals: Names, or instances for settings other than the default: ``Wasserstein(per_class=64)``.
        loss_fn: ``loss_fn(model, batch)`` returns the mean loss of a batch; `model` is called like the user's
            own, `batch` is what the loader gave. By default the cross-entropy of logits and labels, or the
            `loss` that the model returns for a mapping batch.
        seed: For shuffling loaders and for what signals draw. Same seed, same scores.
        progress: Show a bar on a terminal.

    Returns:
        ``scores[signal][group]``, float64 [group.size]; higher is worth more.

    Raises:
        CalibrationError: The data cannot feed what a signal needs.
        ScoreError: A signal is unknown, a weight is not finite, or scores are not.
    """
    chosen = resolve(signals)
    data = None if calibration is None else Calibration.of(calibration, seed=seed)
    return gather(graph, data, chosen, loss_fn=loss_fn, seed=seed, progress=progress)
