"""A batch forward, and forward and backward: simulated operator by operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.scale.simulation import Meter
from benchmarks.scale.subject import Subject
from benchmarks.scale.work import Work
from secateur.signals.program import CapturedModel


def forward(subject: Subject, model: Callable[..., Any] | None = None) -> Work:
    """One batch through the captured program, or another model of the same signature, without gradients."""
    run = model or CapturedModel(subject.graph.programs)
    with torch.no_grad(), Meter() as meter:
        subject.call(run, subject.batch)
    return meter.work()


def forward_backward(subject: Subject) -> Work:
    """One batch, with gradients of every weight that produces a unit, as `signals/onepass.py` takes them."""
    parameters = frozenset(subject.graph.program.graph_signature.parameters)
    names = [n for n in producing(subject) if n in parameters]
    model = CapturedModel(subject.graph.programs, names)
    aliases = {id(model.tensors[n]): model.tensors[n] for n in names}
    with Meter() as meter:
        loss = subject.loss(subject.call(model, subject.batch))
        torch.autograd.grad(loss, list(aliases.values()), allow_unused=True)
    return meter.work()


def producing(subject: Subject) -> list[str]:
    """The state-dict names of the tensors that produce units, each once."""
    groups = subject.graph.groups
    return list(dict.fromkeys(piece.tensor for g in groups for piece in g.of_role("produce")))
