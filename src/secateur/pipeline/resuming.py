"""Score once in a run, also if it is killed and started again: see `secateur.signals.journal`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur.calibration import Calibration
from secateur.signals import Scores, score
from secateur.signals.identity import plain
from secateur.signals.journal import current, model_digest
from secateur.signals.loss import LossFn, loss_name
from secateur.targets.granularity import granularity_of


def scored_once(
    graph: Any,
    model: nn.Module,
    data: Calibration,
    signals: Any,
    *,
    loss_fn: LossFn | None,
    seed: int,
    progress: bool,
) -> Scores:
    """Score, or take the scores from the journal of the run.

    A pass over the data that was killed goes on where it was if units are scored. Other passes start again.

    Args:
        graph: The trace.
        model: The model that was traced.
        data: As for `sc.score`.
        signals: As for `sc.score`.
        loss_fn: As for `sc.score`.
        seed: As for `sc.score`.
        progress: As for `sc.score`.
    """
    journal = current()
    options: dict[str, Any] = {"loss_fn": loss_fn, "seed": seed, "progress": progress}
    if journal is None:
        return score(graph, data, signals, **options)
    what = plain(repr(signals)), str([(group.name, group.size) for group in graph.groups])
    where = (model_digest(model), journal.data(data), str(loss_name(loss_fn, data.first())), str(seed))
    step = journal.step("scores", *where, *what)
    known = step.load(_scores)
    if known is not None:
        return known
    if granularity_of(graph) == "unit":
        options["checkpoint"] = journal.folder / step.name.replace("scores", "scoring")
    found = score(graph, data, signals, **options)
    step.save(*_parts(found))
    return found


def _parts(scores: Scores) -> tuple[Any, dict[str, Tensor]]:
    """Scores as plain data and tensors."""
    names = {signal: list(by_group) for signal, by_group in scores.values.items()}
    tensors = {
        f"{i}.{j}": torch.from_numpy(np.array(vector))
        for i, by_group in enumerate(scores.values.values())
        for j, vector in enumerate(by_group.values())
    }
    return [names, scores.samples, scores.classes, scores.seed, scores.fingerprint], tensors


def _scores(notes: Any, tensors: dict[str, Tensor]) -> Scores:
    """The inverse of `_parts`."""
    names, *others = notes
    values = {
        signal: {group: tensors[f"{i}.{j}"].numpy() for j, group in enumerate(groups)}
        for i, (signal, groups) in enumerate(names.items())
    }
    return Scores(values, *others)
