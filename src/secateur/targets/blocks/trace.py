"""Blocks in `sc.trace`: find a model's residual blocks, prove that they can go, and say what they cost."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from secateur.calibration.reading import Forward, Reading
from secateur.common.foreign import details, error_text
from secateur.common.models import device_of, evaluating, unwrap
from secateur.compat.counting import flop_counter
from secateur.errors import CaptureError, NothingToPruneError
from secateur.graph.inputs import Arguments, InputSpec, batch_size, call_arguments
from secateur.graph.openaxes import find_open_axes
from secateur.graph.passes import Passes
from secateur.proof.verify import argument_sets
from secateur.targets.blocks.block import Block
from secateur.targets.blocks.find import find_blocks
from secateur.targets.blocks.graph import BlockGraph, Removal, build
from secateur.targets.blocks.trial import Trials
from secateur.targets.units.compare import double_copy

_NONE = (
    "No entry gives what it was given and what its layers add, as far as autograd sees. It does not see "
    "what runs under torch.no_grad or in a checkpoint with use_reentrant=True. Blocks that are attributes of "
    "their own, lie in a ModuleDict or return a dictionary are not found."
)


def trace(
    model: nn.Module,
    example_inputs: Any,
    *,
    more_inputs: Iterable[Any] = (),
    forward: Forward | None = None,
) -> BlockGraph:
    """The residual blocks of a model that may go, each tried, and what they cost: see `secateur.trace`.

    Raises:
        NothingToPruneError: There are no two blocks of one part of the network that may go.
        CaptureError: The forward pass fails.
    """
    model = unwrap(model)
    device = device_of(model)
    if device.type == "meta":
        raise CaptureError(
            "trace: expected a model with weights, got one on the meta device. Blocks are found by what a "
            "forward pass shows. Load the weights first."
        )
    more_inputs = list(more_inputs)
    if forward is not None:
        example_inputs = Reading(model, forward).inputs(example_inputs)
        more_inputs = [Reading(model, forward).inputs(inputs) for inputs in more_inputs]
    given = call_arguments(example_inputs, device)
    try:
        blocks, left = find_blocks(model, given)
        costs, macs = _macs(model, blocks, given)
    except Exception as error:
        raise CaptureError(
            f"trace: expected {type(model).__name__} to run on the example inputs, got {error_text(error)}. "
            "Check them.",
            details(error),
        ) from error
    spec = find_open_axes(InputSpec.of(*given, model), given, Passes(model, given).attempt)
    able: list[Block] = []
    removals: dict[str, Removal] = {}
    if blocks:
        sets = argument_sets(spec, given[1] or given[0], device, more_inputs=more_inputs)
        trials = Trials(double_copy(model), sets)
        for container in dict.fromkeys(block.container for block in blocks):
            removal, good, reasons = trials.best_removal([b for b in blocks if b.container == container])
            removals[container] = removal
            able += good
            left |= reasons
    graph = build(model, [b for b in blocks if b in able], left, spec, costs, macs, removals)
    if not graph.groups:
        why = "\n".join(f"{x.group.name}: {x.reason}" for x in graph.left) or _NONE
        raise NothingToPruneError(
            f"trace: expected {type(model).__name__} to have residual blocks that can be dropped: entries of "
            "a ModuleList or Sequential that add to a stream, got fewer than two of one part of the model.\n"
            f"{why}\nChange what a reason names, or leave granularity out for channels and heads."
        )
    return graph


def _macs(model: nn.Module, blocks: list[Block], given: Arguments) -> tuple[dict[str, int], int]:
    """MACs of one sample: of each block, and of the whole model."""
    started: dict[str, int] = {}
    found: dict[str, int] = {}
    counter = flop_counter()
    with (
        ExitStack() as undo,
        evaluating(model),
        torch.no_grad(),
        sdpa_kernel(SDPBackend.MATH),  # fused attention is not counted everywhere
    ):
        for block in blocks:
            module = model.get_submodule(block.path)

            def before(*_: Any, path: str = block.path) -> None:
                started[path] = counter.get_total_flops()

            def after(*_: Any, path: str = block.path) -> None:
                found[path] = counter.get_total_flops() - started[path]

            undo.callback(module.register_forward_pre_hook(before).remove)
            undo.callback(module.register_forward_hook(after).remove)
        with counter:
            model(*given[0], **given[1])
    samples = 2 * max(batch_size(given), 1)
    return {path: flops // samples for path, flops in found.items()}, counter.get_total_flops() // samples
