"""`sc.score` for experts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from secateur.calibration import Calibration, Forward
from secateur.calibration.padding import running_padding
from secateur.common.models import evaluating
from secateur.signals.experts import SIGNALS, Context, ExpertSignal, ExpertTally
from secateur.signals.loss import LossFn, loss_of
from secateur.signals.named import score_named
from secateur.signals.scores import Scores
from secateur.signals.units.combination import SignalLike
from secateur.targets.experts.blocks import Block
from secateur.targets.experts.graph import ExpertGraph, expert_parameters
from secateur.targets.experts.routing import Call, Routed, watching

ExpertAsked: TypeAlias = SignalLike | ExpertSignal
"""A name (also ``a*b`` and ``a+b``), a signal for experts, or a combination of names."""


def score(
    graph: ExpertGraph,
    calibration: Any = None,
    signals: ExpertAsked | Iterable[ExpertAsked] = ("reap", "expert_taylor"),
    *,
    loss_fn: LossFn | None = None,
    forward: Forward | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Scores:
    """Score each expert of each block with every signal, in one pass; see `secateur.score`.

    The model comes back bitwise as it was.

    Returns:
        ``scores[signal][block]``, float64 [experts]; higher is worth more.

    Raises:
        ScoreError: A signal is unknown, or its scores are not finite.
        CalibrationError: The data cannot feed what a signal needs.
    """
    return score_named(
        graph,
        signals,
        SIGNALS,
        ExpertSignal,
        Context(graph, seed),
        ("routing", "gradients"),
        calibration,
        forward,
        lambda data, needing: _gather(
            graph, data, needing["routing"], needing["gradients"], loss_fn, progress
        ),
    )


def _gather(
    graph: ExpertGraph,
    data: Calibration,
    routing: list[ExpertTally],
    gradients: list[ExpertTally],
    loss_fn: LossFn | None,
    progress: bool,
) -> int:
    """One pass; returns the number of samples."""
    model, samples = graph.model, 0

    def watch(call: Call, routed: Callable[[], Routed]) -> None:
        found = routed()
        tokens = running_padding().rows(len(found.hidden), found.hidden.device)
        for tally in routing:
            tally.routed(call, found.only(tokens), tokens)

    with ExitStack() as undo:
        undo.enter_context(evaluating(model))
        if routing:
            undo.enter_context(watching(model, graph.blocks, watch))
        if gradients:
            undo.enter_context(_gradients(graph, gradients))
        else:
            undo.enter_context(torch.no_grad())
        for batch in data.batches("Scoring experts", progress):
            if gradients:
                loss_of(model, batch, loss_fn).backward()
            else:
                batch.run(model)
            samples += batch.size
    return samples


@contextmanager
def _gradients(graph: ExpertGraph, tallies: list[ExpertTally]) -> Iterator[None]:
    """Gradients of experts' parameters alone, handed on and freed one by one as backward makes them."""
    model = graph.model
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    handles = []

    def hand_on(parameter: Tensor, block: Block, number: int | None) -> None:
        if parameter.grad is not None:
            for tally in tallies:
                tally.gradient(block, number, parameter, parameter.grad)
            parameter.grad = None

    try:
        for parameter, _, _ in before:
            parameter.requires_grad_(False)
            parameter.grad = None
        for block in graph.blocks:
            for _, parameter, number in expert_parameters(model, block):
                parameter.requires_grad_(True)
                handles.append(
                    parameter.register_post_accumulate_grad_hook(partial(hand_on, block=block, number=number))
                )
        with torch.enable_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, required, gradient in before:
            parameter.requires_grad_(required)
            parameter.grad = gradient
