"""A capture that leaves every size open that may vary, where that takes no more than a fixed effort."""

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
from secateur.graph.leaf import Place
from secateur.graph.nodes import is_open
from secateur.targets.units.alignment import PathsDifferError, Steps

QUESTIONS = 60_000
"""How many questions about sizes a capture may ask; DenseNet-121 asks 33,000."""
TERMS = 500
"""How long an expression of sizes may get. Those of windows that are padded at every level (Swin) grow to
thousands of terms, each of which takes longer than a whole capture of other models. ResNet's have 76."""


class TooMuchError(BaseException):
    """Passes through code that handles every Exception."""


@contextmanager
def limited() -> Iterator[dict[Any, str]]:
    """A capture inside the block stops with `TooMuchError` where its sizes get too complicated.

    Gives what the capture assumes about sizes, and for each the line of the user's code that needs it.
    """
    original = ShapeEnv.evaluate_expr
    asked = itertools.count(1)
    lines: dict[Any, str] = {}

    def evaluate(self: Any, expression: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(expression, sympy.Basic):
            terms = sum(1 for _ in itertools.islice(sympy.preorder_traversal(expression), TERMS + 1))
            if terms > TERMS or next(asked) > QUESTIONS:
                raise TooMuchError
        known = len(self.guards)
        found = original(self, expression, *args, **kwargs)
        for guard in self.guards[known:]:
            lines.setdefault(guard.expr, running_line(sys._getframe()))
        return found

    ShapeEnv.evaluate_expr = evaluate  # type: ignore[assignment,method-assign]
    try:
        # Two axes that happen to be equally long may come to differ.
        with _config.patch(use_duck_shape=False):  # type: ignore[attr-defined]
            yield lines
    finally:
        ShapeEnv.evaluate_expr = original  # type: ignore[method-assign]


@dataclass(frozen=True)
class Opened:
    """A program with more open axes.

    Attributes:
        program: The program.
        lines: What it assumes about sizes, and the line of the user's code that needs it.
        axes: What `capture` has to leave open for a program that can be compared with this one; empty if
            that of the trace can, because it runs the same operators.
    """

    program: ExportedProgram
    lines: dict[Any, str]
    axes: tuple[Place, ...]


def open_program(model: nn.Module, graph: Graph) -> Opened | None:
    """The program of a trace with more open axes; None where there are no more, or capture cannot tell."""
    more = {place for axis in graph.inputs.open if not axis.batch for place in axis.places}
    if not more:
        return None
    args, kwargs = graph.captured_inputs()
    leaves = [v for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, torch.Tensor)]
    numbers = {name: str(number) for number, name in enumerate(graph.inputs.tensors())}
    also = [(numbers[name], axis) for name, axis in more if leaves[int(numbers[name])].shape[axis] > 1]
    try:
        with limited() as lines:
            program = capture(model, args, kwargs, also=also).program
    except (CaptureError, TooMuchError):
        return None
    if _count_open(program) <= _count_open(graph.program):
        return None
    try:
        alike = not any(Steps(graph.program).compare(Steps(program)))
    except PathsDifferError:  # captures of fixed sizes leave out what takes all of an axis
        alike = False
    return Opened(program, lines, () if alike else tuple(also))


def _count_open(program: ExportedProgram) -> int:
    """How many axes of the inputs a program leaves open."""
    inputs = set(program.graph_signature.user_inputs)
    values = [n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder" and n.name in inputs]
    return sum(is_open(size) for v in values if isinstance(v, torch.Tensor) for size in v.shape)
