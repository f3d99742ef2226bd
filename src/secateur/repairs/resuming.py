"""Run repairs, or reuse the results of a killed run: see `secateur.signals.journal`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from secateur.common.models import named_tensors
from secateur.common.reading import Count
from secateur.errors import ArtefactError
from secateur.repairs.judging import Judge
from secateur.repairs.methods import Method, Repair, Work
from secateur.repairs.notes import Notes
from secateur.repairs.polish import Polish
from secateur.signals.identity import digest_of, plain
from secateur.signals.journal import (
    Journal,
    Step,
    checked_notes,
    current_journal,
    model_digest,
    plan_digest,
    require_like,
)
from secateur.targets.units.record import record_of

_CHUNK = 1 << 26
"""A file holds about this many bytes of tensors, so that reading it takes little memory."""


class _Done(BaseModel):
    """The result of a repair without its tensors: its notes, and the number of files with tensors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    notes: Notes | None
    chunks: Count


def run(method: Method, small: nn.Module, work: Work) -> dict[str, Any] | None:
    """Run a repair, or read its result from the journal of the run.

    The user's own repairs always run: it is not known what they depend on.

    Args:
        method: The repair.
        small: The model. It is changed in place.
        work: The inputs of the repair.

    Returns:
        What the repair returns: notes, or None if it could change nothing.
    """
    journal = current_journal()
    if journal is None or not isinstance(method, Repair | Polish):
        return method.run(small, work)
    judge = "" if work.judge is None else described(work.judge, journal)
    step = journal.step("repair", _named(method), *_model(small), journal.data(work.data), judge)
    known = step.load(lambda notes, _: checked_notes(_Done, notes))
    if known is not None:
        for k in range(known.chunks):
            _restore(small, journal.step("changed", step.name, str(k)))
        return None if known.notes is None else known.notes.model_dump(exclude_unset=True)
    before = _digests(small)
    with step.inside():
        notes = method.run(small, replace(work, kept=journal.step("passes", step.name)))
    count = 0
    for tensors in _chunks(before, small):
        journal.step("changed", step.name, str(count)).save(None, tensors)
        count += 1
    step.save({"notes": notes, "chunks": count})
    return notes


def judged(models: Sequence[nn.Module], judges: Sequence[Judge]) -> NDArray[np.float64]:
    """Measure each model with its judge, or read the errors from the journal of the run. [errors]"""
    journal = current_journal()
    if journal is None:
        return np.concatenate(_judged(models, judges))
    pairs = zip(models, judges, strict=True)
    parts = [part for model, judge in pairs for part in (*_model(model), described(judge, journal))]
    step = journal.step("judged", *parts)
    known = step.load(lambda _, tensors: _joined(judges, tensors))
    if known is not None:
        return known
    found = _judged(models, judges)
    step.save(None, {str(k): torch.from_numpy(errors) for k, errors in enumerate(found)})
    return np.concatenate(found)


def _judged(models: Sequence[nn.Module], judges: Sequence[Judge]) -> list[NDArray[np.float64]]:
    return [judge(m) for m, judge in zip(models, judges, strict=True)]


def _joined(judges: Sequence[Judge], tensors: Mapping[str, Tensor]) -> NDArray[np.float64]:
    """Return the saved errors of all judges, joined."""
    return np.concatenate([judge.fitting(tensors[str(k)]) for k, judge in enumerate(judges)])


def described(judge: Judge, journal: Journal) -> str:
    """Return a text that identifies what a judge measures, and on which data."""
    return f"{judge.measure} on {journal.data(judge.data)}"


def _named(method: Method) -> str:
    return method.name if isinstance(method, Repair) else plain(repr(method))


def _model(model: nn.Module) -> tuple[str, str]:
    """Return texts that identify a pruned model of this run."""
    return model_digest(model), plan_digest(record_of(model).plan)


def _digests(model: nn.Module) -> dict[str, str]:
    return {name: digest_of({name: tensor}) for name, tensor in named_tensors(model).items()}


def _chunks(before: Mapping[str, str], after: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors whose digests changed, a few at a time."""
    chunk: dict[str, Tensor] = {}
    for name, tensor in named_tensors(after).items():
        if digest_of({name: tensor}) == before[name]:
            continue
        if chunk and sum(t.nbytes for t in chunk.values()) + tensor.nbytes > _CHUNK:
            yield chunk
            chunk = {}
        chunk[name] = tensor
    if chunk:
        yield chunk


@torch.no_grad()
def _restore(small: nn.Module, step: Step) -> None:
    held = named_tensors(small)
    tensors = step.load(lambda _, found: require_like(found, held))
    if tensors is None:
        raise ArtefactError(f"{step.path}: expected the tensors of a repair, got no file. Delete the folder.")
    for name, tensor in tensors.items():
        held[name].copy_(tensor)
