"""Score, or reuse the scores of a killed run: see `secateur.signals.journal`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from secateur.calibration import Calibration
from secateur.signals import Scores, score
from secateur.signals.identity import plain
from secateur.signals.journal import checked_notes, current_journal, model_digest, require_like
from secateur.signals.loss import LossFn, loss_name
from secateur.signals.scores import Table
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
    """Score, or read the scores from the journal of the run.

    If a pass over the data was killed, scoring of units resumes where it stopped. Other passes start again.

    Args:
        graph: The trace.
        model: The model that was traced.
        data: As for `sc.score`.
        signals: As for `sc.score`.
        loss_fn: As for `sc.score`.
        seed: As for `sc.score`.
        progress: As for `sc.score`.
    """
    journal = current_journal()
    options: dict[str, Any] = {"loss_fn": loss_fn, "seed": seed, "progress": progress}
    if journal is None:
        return score(graph, data, signals, **options)
    sizes = {group.name: group.size for group in graph.groups}
    what = plain(repr(signals)), str([*sizes.items()])
    where = (model_digest(model), journal.data(data), str(loss_name(loss_fn, data.first())), str(seed))
    step = journal.step("scores", *where, *what)
    known = step.load(partial(_from_journal, sizes))
    if known is not None:
        return known
    if granularity_of(graph) == "unit":
        options["checkpoint"] = journal.folder / step.name.replace("scores", "scoring")
    found = score(graph, data, signals, **options)
    table, tensors = found.parts()
    step.save(table.model_dump(mode="json"), tensors)
    return found


def _from_journal(sizes: Mapping[str, int], notes: Any, tensors: Mapping[str, Tensor]) -> Scores:
    """Make scores from the journal's notes and tensors.

    Raises:
        ValueError: They are not scores of groups with these names and sizes.
    """
    table = checked_notes(Table, notes)
    if set(table.groups) != set(sizes):
        raise ValueError(f"scores of {len(table.groups)} groups, which are not those of the model")
    names = [(f"{i}.{j}", g) for i in range(len(table.signals)) for j, g in enumerate(table.groups)]
    wanted = {name: torch.empty(sizes[group], dtype=torch.float64) for name, group in names}
    return Scores.of_parts(table, require_like({name: tensors[name] for name in wanted}, wanted))
