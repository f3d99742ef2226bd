"""A capture in which every size that may vary is open (symbolic), unless that takes too long."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx.experimental import _config
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from secateur.common.foreign import running_line
from secateur.errors import CaptureError
from secateur.graph.capture import capture
from secateur.graph.graph import Graph
from secateur.graph.inputs import Arguments, InputSpec
from secateur.graph.leaf import Place
from secateur.graph.programs import open_places
from secateur.targets.units.graph_form.alignment import PathsDifferError, Steps

QUESTIONS = 60_000
"""The most questions about sizes that a capture may ask. DenseNet-121 asks 33,000."""
TERMS = 500
"""The most terms in an expression of sizes. In ResNet they have 76. Where windows are padded at every level,
as in Swin, they grow to thousands of terms, and each takes longer than the whole capture of another model."""


class TooMuchError(BaseException):
    """Raised where a capture takes too long. No ``except Exception`` in between catches it."""


@contextmanager
def limited() -> Iterator[dict[Any, str]]:
    """Inside, a capture raises `TooMuchError` if its sizes get too complicated.

    Yields:
        What the capture assumes about sizes, each with the line of the user's code that needs it.
    """
    original = ShapeEnv.evaluate_expr
    asked = itertools.count(1)
    lines: dict[Any, str] = {}

    def evaluate(self: Any, expression: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(expression, sympy.Basic):
            terms = sum(1 for _ in itertools.islice(sympy.preorder_traversal(expression), TERMS + 1))
            if terms > TERMS or next(asked) > QUESTIONS:
                raise TooMuchError
        before = len(self.guards)
        found = original(self, expression, *args, **kwargs)
        for guard in self.guards[before:]:
            lines.setdefault(guard.expr, running_line(sys._getframe()))
        return found

    ShapeEnv.evaluate_expr = evaluate  # type: ignore[assignment,method-assign]
    try:
        # Two axes that have the same size now may have different sizes later.
        with _config.patch(use_duck_shape=False):  # type: ignore[attr-defined]
            yield lines
    finally:
        ShapeEnv.evaluate_expr = original  # type: ignore[method-assign]


@dataclass(frozen=True)
class Opened:
    """A program with more open axes than that of the trace.

    Attributes:
        program: The program.
        lines: What it assumes about sizes, each with the line of the user's code that needs it.
        axes: The axes to open in further captures, so that they run the same operators as this program. Empty
            if the program of the trace already runs the same operators.
    """

    program: ExportedProgram
    lines: dict[Any, str]
    axes: tuple[Place, ...]


def open_program(model: nn.Module, graph: Graph) -> Opened | None:
    """Capture a program with more open axes; None if there are no more, or the capture fails."""
    if all(axis.batch for axis in graph.inputs.open):
        return None
    args, kwargs = graph.captured_inputs()
    also = further_axes(graph.inputs, (args, kwargs))
    try:
        with limited() as lines:
            program = capture(model, args, kwargs, also=also).program
    except (CaptureError, TooMuchError):
        return None
    if len(open_places(program)) <= len(open_places(graph.program)):
        return None
    try:
        is_same = not any(Steps(graph.program).compare(Steps(program)))
    except PathsDifferError:  # a capture of fixed sizes leaves out slices of a whole axis
        is_same = False
    return Opened(program, lines, () if is_same else tuple(also))


def further_axes(spec: InputSpec, given: Arguments) -> list[Place]:
    """Return the axes beside the batch that the model takes at other sizes. Tensors are numbered.

    Those of size one are left out, since a capture takes that for a constant.
    """
    numbers = {name: str(number) for number, name in enumerate(spec.tensors())}
    leaves = [leaf for leaf in pytree.tree_leaves(given) if isinstance(leaf, torch.Tensor)]
    return [
        (numbers[name], axis)
        for free in spec.open
        if not free.batch
        for name, axis in free.places
        if leaves[int(numbers[name])].shape[axis] > 1
    ]
