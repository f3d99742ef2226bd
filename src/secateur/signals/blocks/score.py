"""`sc.score` for residual blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import takewhile
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from secateur.calibration import Batch, Calibration, Forward
from secateur.common.models import copied, evaluating
from secateur.measure.evaluate import floats_of, squared_distance
from secateur.signals.blocks import SIGNALS, BlockSignal, BlockTally, Context
from secateur.signals.loss import LossFn, loss_of
from secateur.signals.named import score_named
from secateur.signals.scores import Scores
from secateur.signals.units.combination import SignalLike
from secateur.targets.blocks.block import Block, bypassing, watching
from secateur.targets.blocks.graph import BlockGraph
from secateur.targets.experts.routing import replaced

HELD_BYTES = 1 << 29
"""Most bytes of what blocks give that are kept: then ``output_change`` need not run the first ones again."""

BlockAsked: TypeAlias = SignalLike | BlockSignal
"""A name (also ``a*b`` and ``a+b``), a signal for blocks, or a combination of names."""


def score(
    graph: BlockGraph,
    calibration: Any = None,
    signals: BlockAsked | Iterable[BlockAsked] = ("output_change", "stream_change"),
    *,
    loss_fn: LossFn | None = None,
    forward: Forward | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Scores:
    """Score each residual block with every signal; see `secateur.score`.

    The data are read once. ``output_change`` runs each batch once more for each block. The model comes back
    bitwise as it was.

    Returns:
        ``scores[signal][group]``, float64 [blocks]; higher is worth more.

    Raises:
        ScoreError: A signal is unknown, or its scores are not finite.
        CalibrationError: The data cannot feed what a signal needs.
    """

    def look(data: Calibration, needing: Mapping[str, list[BlockTally]]) -> int:
        samples = 0
        for batch in data.batches("Scoring blocks", progress):
            _look(graph, batch, needing, loss_fn)
            samples += batch.size
        return samples

    needs = ("streams", "outputs", "gradients")
    context = Context(graph, seed)
    return score_named(graph, signals, SIGNALS, BlockSignal, context, needs, calibration, forward, look)


def _look(
    graph: BlockGraph, batch: Batch, needing: Mapping[str, list[BlockTally]], loss_fn: LossFn | None
) -> None:
    """Show one batch to the signals."""
    model, blocks = graph.model, graph.all_blocks()

    def see(block: Block, before: Tensor, after: Tensor) -> None:
        x, y = (_positions(value, batch) for value in (before, after))
        for tally in needing["streams"]:
            tally.stream(block.path, x, y)

    if needing["streams"] or needing["outputs"]:
        with ExitStack() as undo:
            undo.enter_context(evaluating(model))
            undo.enter_context(torch.no_grad())
            given: dict[str, Any] = {}
            with watching(model, blocks if needing["streams"] else (), see), _kept(model, blocks, given):
                wanted = floats_of(batch.run(model), batch)
            for block in blocks if needing["outputs"] else ():
                with _replayed(model, given, block.path), bypassing(model, [block]):
                    change, size = squared_distance(floats_of(batch.run(model), batch), wanted)
                for tally in needing["outputs"]:
                    tally.output(block.path, float(change.sum()), float(size.sum()))
    if needing["gradients"]:
        for path, derivative in _gates(model, blocks, batch, loss_fn).items():
            for tally in needing["gradients"]:
                tally.gate(path, derivative)


@contextmanager
def _kept(model: nn.Module, blocks: Iterable[Block], given: dict[str, Any]) -> Iterator[None]:
    """Inside, what blocks give is kept, in order of execution, as far as that takes little memory."""
    held = 0

    def keep(path: str, module: nn.Module, args: Any, output: Any) -> None:
        nonlocal held
        held += sum(t.nbytes for t in pytree.tree_leaves(output) if isinstance(t, Tensor))
        if held <= HELD_BYTES:
            given[path] = copied(output)

    handles = [
        model.get_submodule(block.path).register_forward_hook(partial(keep, block.path)) for block in blocks
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _replayed(model: nn.Module, given: dict[str, Any], until: str) -> Iterator[None]:
    """Inside, blocks that run before another one give what they gave, without running."""
    with ExitStack() as undo:
        for path, output in takewhile(lambda item: item[0] != until, given.items()):
            again = partial(_again, output)
            undo.enter_context(replaced(model.get_submodule(path), again))
        yield


def _again(output: Any, *_: Any, **__: Any) -> Any:
    return copied(output)


def _positions(stream: Tensor, batch: Batch) -> Tensor:
    """Tokens that are no padding, or whole samples where the stream is a map. [positions, width]"""
    if stream.ndim > 3:
        return stream.flatten(1)
    return batch.padding.matrix(stream)


def _gates(
    model: nn.Module, blocks: Iterable[Block], batch: Batch, loss_fn: LossFn | None
) -> dict[str, float]:
    """The derivative of the loss by a factor on what each block adds, by path."""
    factors = {block.path: torch.ones((), requires_grad=True) for block in blocks}

    def gated(block: Block, before: Tensor, after: Tensor) -> Tensor:
        factor = factors[block.path].to(after.device)
        return after + (factor - 1) * (after - before)

    with evaluating(model), _frozen(model), torch.enable_grad(), watching(model, blocks, gated):
        loss_of(model, batch, loss_fn).backward()
    return {path: 0.0 if f.grad is None else float(f.grad) for path, f in factors.items()}


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Inside, no parameter asks for a gradient."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)
