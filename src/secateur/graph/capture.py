"""Capture of a model with `torch.export`."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram, ShapesCollection, export
from torch.utils import _pytree as pytree

from secateur.collecting import uncollected
from secateur.errors import CaptureError
from secateur.graph.inline import inline_regions
from secateur.graph.inputs import Place, batch_size
from secateur.graph.recurrences import shapes_known
from secateur.graph.rules.op import hint, is_open
from secateur.kernels import capturable
from secateur.models import evaluation_mode
from secateur.preserving import preserved


def capture(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    shapes: ShapesCollection | None = None,
    *,
    also: Collection[Place] = (),
    training: bool = False,
) -> tuple[ExportedProgram, int, int | None]:
    """Capture a model in one mode, with a batch axis of any size where the model allows it.

    Args:
        model: What to capture.
        args: Positional arguments.
        kwargs: Keyword arguments.
        shapes: Which axes may have any size; the first of each tensor that is as long as the batch if
            not given.
        also: Further axes that may have any size, if `shapes` is not given; tensors by number.
        training: Capture it in training mode, not in evaluation mode.

    Returns:
        The program, the batch size of the capture, and that size again if the program accepts no other.
    """
    given = args, dict(kwargs)
    if shapes is None:
        args, kwargs = _at_least_two(*given)
        shapes = _open_axes((args, kwargs), also)
    with (
        preserved(model, functions=True),
        evaluation_mode(model, training=training),
        capturable(model),
        shapes_known(),
        torch.enable_grad(),
        _quiet(),
        uncollected(),
    ):
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


def _open_axes(arguments: Any, also: Collection[Place]) -> ShapesCollection:
    """The batch axis of each tensor that has one, and the others asked for."""
    leaves = [leaf for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, torch.Tensor)]
    batch = batch_size(arguments)
    shapes = ShapesCollection()
    for number, leaf in enumerate(leaves):
        axes = {axis for name, axis in also if name == str(number)}
        if leaf.ndim and leaf.shape[0] == batch:
            axes.add(0)
        if axes:
            shapes[leaf] = dict.fromkeys(sorted(axes), Dim.AUTO)
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
