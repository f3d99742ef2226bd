"""From a model to its graph: capture, then labels, then groups."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from secateur.errors import CaptureError, NothingToPruneError
from secateur.graph.assemble import assemble, cost_model
from secateur.graph.capture import capture
from secateur.graph.datasizes import measure_sizes
from secateur.graph.graph import Graph, fingerprint
from secateur.graph.inputs import InputSpec, call_arguments
from secateur.graph.openaxes import open_inputs
from secateur.graph.walk import walk
from secateur.models import unwrap


def trace(
    model: nn.Module, example_inputs: Any, *, more_inputs: Iterable[Any] = (), allow_inexact: bool = False
) -> Graph:
    """Find what can be removed from a model, and what has to go together.

    Args:
        model: Any module that `torch.export` can capture; it is left as it was.
        example_inputs: A tensor, a tuple of positional arguments, or a mapping of keyword arguments.
            Tensors are moved to the model's device. The first axis is taken as the batch. The model is also
            run at other sizes of every axis, to learn which may vary (``graph.inputs``); what is found to go
            together holds at both sizes.
        more_inputs: Further inputs of other sizes, as in `example_inputs`: the axes in which they differ may
            vary, and are not tried.
        allow_inexact: Also offer groups whose units an operator mixes without weights (a layer norm
            over channels, say): removing some changes what the others compute.

    Returns:
        The groups, what is frozen and why, and a cost model.

    Raises:
        CaptureError: If `torch.export` cannot capture the model, or it returns no tensor.
        NothingToPruneError: If no group of units may be removed.
        SettingError: If the model is no module, or the inputs are of no known kind.

    Example:
        >>> import secateur as sc
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> graph = sc.trace(net, torch.zeros(2, 4))
        >>> [(group.name, group.size) for group in graph.groups]
        [('0', 8)]
    """
    model = unwrap(model)
    device = next((t.device for t in model.state_dict().values()), None)
    given = call_arguments(example_inputs, device)
    spec = InputSpec.of(*given, model)  # refuses what no plan could hold before anything takes time
    program, batch, static = capture(model, *given)
    if not any(
        isinstance(v.meta.get("val"), torch.Tensor) for v in program.graph.output_node().all_input_nodes
    ):
        raise CaptureError(
            f"trace: expected {type(model).__name__} to return tensors, got none. Return a tensor."
        )
    more = [call_arguments(arguments, device) for arguments in more_inputs]
    spec, larger = open_inputs(model, spec, given, program, more, static)
    other = None
    if larger is not None:
        with contextlib.suppress(CaptureError):  # `verify` still runs the model at that size
            other = capture(model, *larger)[0]
    for captured in (program, other):
        if captured is not None:
            measure_sizes(captured)
    state, tensors = walk(program, other)
    assembled = assemble(state, tensors, allow_inexact=allow_inexact)
    alone = {left.group.name for left in assembled.left}
    groups = tuple(g for g in assembled.groups if g.name not in alone)
    graph = Graph(
        groups=groups,
        left=assembled.left,
        frozen=assembled.frozen,
        program=program,
        fingerprint=fingerprint(model),
        inputs=spec,
        static_batch=static,
        walk=state,
        assembled=assembled,
        costs=cost_model(assembled, state, tensors, batch),
        tensors=tuple(tensors),
    )
    if not groups:
        raise NothingToPruneError(
            f"trace: expected {type(model).__name__} to have units that can be removed, found none.\n"
            f"{graph}\n"
            f"Layers that read only the input or write only the output keep their size; "
            f"pass allow_inexact=True to include groups that an operator mixes."
        )
    return graph
