"""Blocks in `sc.repair`: what stays makes up for what went, by the repairs of units."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from secateur.calibration import Calibration, Forward
from secateur.common.models import device_of, unwrap
from secateur.errors import SecateurError
from secateur.graph.graph import Graph
from secateur.graph.inputs import InputSpec
from secateur.graph.openaxes import find_open_axes
from secateur.graph.passes import Passes
from secateur.graph.trace import retrace
from secateur.repairs.methods import Method, Methods, Work, resolve
from secateur.repairs.repair import run_repairs
from secateur.signals.loss import LossFn
from secateur.targets.blocks.apply import removed_blocks
from secateur.targets.blocks.block import Block, PassThrough, argument, with_first
from secateur.targets.blocks.graph import BlockGraph
from secateur.targets.blocks.remove import can_pass, copied_tensors, names_after, removed_paths
from secateur.targets.blocks.trace import trace
from secateur.targets.units.copying import duplicate
from secateur.targets.units.record import Record, attach, record_of, with_repairs


def repair(
    small: nn.Module,
    model: nn.Module,
    calibration: Any,
    methods: Methods = "auto",
    *,
    own: Mapping[str, Method] | None = None,
    graph: BlockGraph | None = None,
    loss_fn: LossFn | None = None,
    forward: Forward | None = None,
    seed: int = 0,
    progress: bool = True,
) -> nn.Module:
    """Reduce the error that dropped blocks cause: see `secateur.repair`.

    The repairs see the dense model with the blocks bypassed, whose tensors have the dense names. So
    ``reconstruct`` refits every layer behind a dropped block, and where a layer adds to the stream, so that
    the stream after it is the dense one. The result goes into the smaller model.

    Args:
        small: As for `secateur.repair`.
        model: As for `secateur.repair`.
        calibration: As for `secateur.repair`.
        methods: As for `secateur.repair`.
        own: As for `secateur.repair`.
        graph: The trace of the blocks.
        loss_fn: As for `secateur.repair`.
        forward: As for `secateur.repair`.
        seed: As for `secateur.repair`.
        progress: As for `secateur.repair`.

    Raises:
        CaptureError: A repair that was asked for by name needs a captured program, and there is none.
    """
    options: dict[str, Any] = {"own": own, "loss_fn": loss_fn, "seed": seed, "progress": progress}
    data = Calibration.of(calibration, seed=seed, forward=forward, model=unwrap(model))
    return repaired(small, unwrap(model), data, methods, [], graph, **options)


def repaired(
    small: nn.Module,
    model: nn.Module,
    data: Calibration,
    methods: Methods,
    program: list[Graph],
    graph: BlockGraph | None = None,
    start: nn.Module | None = None,
    **options: Any,
) -> nn.Module:
    """Do what `repair` does.

    Args:
        small: As for `repair`.
        model: As for `repair`.
        data: The calibration data.
        methods: As for `repair`.
        program: A list with the trace of the model's units, or an empty one, to which it is added.
        graph: As for `repair`.
        start: As for `bypassed`.
        options: Those of `secateur.repairs.repair.run_repairs`.
    """
    graph = graph or trace(model, data.to(device_of(model)).first().inputs)
    opened = bypassed(small, model, graph, start)
    if not _programmed(model, data, graph, program) and methods == "auto":
        methods = "batchnorm"
    better = run_repairs(opened, model, data, methods, program, **options)
    found = with_tensors_of(better, small, model)
    return with_repairs(found, [*record_of(better).repairs[len(record_of(opened).repairs) :]])


def refitted(
    small: nn.Module,
    model: nn.Module,
    data: Calibration,
    methods: Methods,
    *,
    graph: BlockGraph,
    program: list[Graph],
) -> nn.Module:
    """Run repairs without looking whether they help; none where the model has no captured program."""
    chosen = next(iter(resolve(methods)), ())
    if not chosen or not _programmed(model, data, graph, program):
        return small
    opened = bypassed(small, model, graph)
    for method in chosen:
        method.run(opened, Work(lambda: program[0], data))
    return with_tensors_of(opened, small, model)


def _programmed(model: nn.Module, data: Calibration, graph: BlockGraph, program: list[Graph]) -> bool:
    """Capture the program of a model, if that was not done; whether it can be."""
    if not program:
        batch = data.to(device_of(model)).first()
        given = batch.args, dict(batch.kwargs)
        try:
            spec = InputSpec.of(*given, model)
            if spec.is_like(graph.inputs):  # which knows the axes that may vary
                spec = graph.inputs
            else:
                spec = find_open_axes(spec, given, Passes(model, given).attempt)
            program.append(retrace(model, spec, given, allow_inexact=True, may_be_empty=True))
        except SecateurError:  # it has none
            return False
    return True


def bypassed(
    small: nn.Module, model: nn.Module, graph: BlockGraph, start: nn.Module | None = None
) -> nn.Module:
    """Return a copy of the dense model that computes what the smaller one does, with the dense names.

    Args:
        small: The smaller model, which may be repaired.
        model: The dense model.
        graph: The trace of the blocks.
        start: Where units went too, the dense model without these alone; its record has what it lost, and
            the blocks. It is changed. None: a copy of the dense model.
    """
    record = record_of(small)
    opened = duplicate(model) if start is None else start
    paths = removed_paths(record.plan)
    names = names_after(model, model.state_dict(), paths, record.stand_ins)
    copied_tensors({new: old for old, new in names.items()}, small, opened)
    bypass(opened, removed_blocks(graph, record.plan))
    return attach(opened, Record(record.plan if start is None else record_of(start).plan, "module"))


def bypass(model: nn.Module, blocks: Iterable[Block]) -> None:
    """Let blocks of a model pass on what they read, from now on."""
    for block in blocks:
        module = model.get_submodule(block.path)
        if can_pass(block):
            vars(module)["forward"] = PassThrough(block, module).forward
        else:
            module.register_forward_hook(_Bypass(block), with_kwargs=True)


def with_tensors_of(opened: nn.Module, small: nn.Module, model: nn.Module) -> nn.Module:
    """Return a copy of the smaller model with the tensors of what `bypassed` made."""
    record, found = record_of(small), duplicate(small)
    names = names_after(model, model.state_dict(), removed_paths(record.plan), record.stand_ins)
    copied_tensors(names, opened, found)
    return attach(found, record)


class _Bypass:
    """A hook that puts the stream that a block read in the place of the one that it gives."""

    def __init__(self, block: Block) -> None:
        self._block = block

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        return with_first(output, argument(self._block.stream, args, kwargs))
