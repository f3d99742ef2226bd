"""Capture with `torch.export`, then labels, then groups."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram, ShapesCollection, export
from torch.utils import _pytree as pytree

from secateur.collecting import uncollected
from secateur.errors import CaptureError, NothingToPruneError
from secateur.graph.assemble import assemble, cost_model
from secateur.graph.datasizes import measure_sizes
from secateur.graph.graph import Graph, fingerprint
from secateur.graph.inline import inline_regions
from secateur.graph.inputs import InputSpec, batch_size, call_arguments
from secateur.graph.rules.op import hint, is_open
from secateur.graph.walk import walk
from secateur.kernels import capturable
from secateur.models import evaluating, unwrap


def trace(model: nn.Module, example_inputs: Any, *, allow_inexact: bool = False) -> Graph:
    """Find what can be removed from a model, and what has to go together.

    Args:
        model: Any module that `torch.export` can capture; it is left as it was.
        example_inputs: A tensor, a tuple of positional arguments, or a mapping of keyword arguments.
            Shapes and dtypes matter, values do not; tensors are moved to the model's device. The first
            axis is taken as the batch; where the model allows it, the captured program then accepts any
            batch size.
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
    args, kwargs = call_arguments(example_inputs, device)
    spec = InputSpec.of(args, kwargs)
    program, batch, static = capture(model, args, kwargs)
    if not any(
        isinstance(v.meta.get("val"), torch.Tensor) for v in program.graph.output_node().all_input_nodes
    ):
        raise CaptureError(
            f"trace: expected {type(model).__name__} to return tensors, got none. Return a tensor."
        )
    measure_sizes(program)
    state, tensors = walk(program)
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


def capture(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    shapes: ShapesCollection | None = None,
) -> tuple[ExportedProgram, int, int | None]:
    """Capture a model in evaluation mode, with a batch axis of any size where the model allows it.

    Args:
        model: What to capture.
        args: Positional arguments.
        kwargs: Keyword arguments.
        shapes: Which axes may have any size; the first of each tensor that is as long as the batch if
            not given.

    Returns:
        The program, the batch size of the capture, and that size again if the program accepts no other.
    """
    given = args, dict(kwargs)
    if shapes is None:
        args, kwargs = _at_least_two(*given)
        shapes = _batch_axes((args, kwargs))
    with evaluating(model), capturable(model), torch.no_grad(), _quiet(), uncollected():
        try:
            program = export(model, args, kwargs, dynamic_shapes=shapes, strict=False)  # type: ignore[arg-type]
        except Exception:  # whatever stops the general capture, the exact one may still work
            try:
                program = export(model, *given, strict=False)
            except Exception as error:
                raise CaptureError(
                    f"trace: torch.export could not capture {type(model).__name__}: "
                    f"{_first_lines(error)} Check that model(*example_inputs) runs, and that its forward "
                    f"pass does not branch on values."
                ) from error
    inline_regions(program)
    inputs = [
        n
        for n in program.graph.nodes
        if n.op == "placeholder" and n.name in program.graph_signature.user_inputs
    ]
    sizes = [
        n.meta["val"].shape[0]
        for n in inputs
        if isinstance(n.meta.get("val"), torch.Tensor) and n.meta["val"].ndim
    ]
    dynamic = any(map(is_open, sizes))
    captured = hint(sizes[0]) if sizes else 1
    return program, captured, None if dynamic else captured


def _batch_axes(arguments: Any) -> ShapesCollection:
    leaves = [leaf for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, torch.Tensor)]
    batch = batch_size(arguments)
    shapes = ShapesCollection()
    for leaf in leaves:
        if leaf.ndim and leaf.shape[0] == batch:
            shapes[leaf] = {0: Dim.AUTO}
    return shapes


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what capture says of its own internals, by warnings, logs and prints.

    What stops it comes as an exception, and often only stops the first of two attempts.
    """
    logs = [
        logging.getLogger(f"torch.{n}")
        for n in ("_subclasses.fake_tensor", "fx.experimental.symbolic_shapes")
    ]
    disabled = [log.disabled for log in logs]
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            for log in logs:
                log.disabled = True
            yield
        finally:
            for log, was in zip(logs, disabled, strict=True):
                log.disabled = was


def _at_least_two(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Repeat a batch of one: a size of one would be captured as a constant."""
    leaves, structure = pytree.tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.ndim]
    if not tensors or any(t.shape[0] != 1 for t in tensors):
        return args, kwargs
    leaves = [torch.cat([v, v]) if isinstance(v, torch.Tensor) and v.ndim else v for v in leaves]
    doubled: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_unflatten(leaves, structure)
    return doubled


def _first_lines(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 400 else text[:400] + " …"
