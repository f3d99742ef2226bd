"""Sizes at which the model's code only leaves calls out: the first program may be right there too."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from secateur.graph.executionpath import ExecutionPath
from secateur.graph.inputs import Arguments
from secateur.graph.passes import Passes
from secateur.graph.programs import values_at


class Omissions:
    """Decides which sizes need no capture of their own, since the model's code only leaves calls out there.

    At such a size the code makes no new call, and the first program gives what the model gives: the calls
    that are left out change nothing. A later size needs no capture either if it leaves out only such calls,
    compared with a size that was captured.
    """

    def __init__(
        self,
        model: nn.Module,
        program: ExportedProgram,
        passes: Passes,
        given: Arguments,
        first: ExecutionPath | None,
    ) -> None:
        """Start with what the first program holds.

        Args:
            model: The dense model.
            program: The first program.
            passes: Runs ordinary forward passes of the model.
            given: The arguments of the trace.
            first: The execution path of the pass that was captured.
        """
        self._model, self._program, self._passes = model, program, passes
        self._given, self._first = given, first
        self._captured = [] if first is None else [first]  # the paths of captured passes
        self._idle = set[Any]()  # calls that change nothing
        self._left_out = set[Any]()  # at captured sizes, with other answers to conditions on values

    def explain(self, arguments: Arguments, replays: Iterable[Arguments]) -> bool:
        """Whether these arguments need no capture.

        Args:
            arguments: Arguments of another size.
            replays: Arguments with the same calls, on which the program is compared with the model.
        """
        first, here = self._first, self._passes.path_of(arguments)
        if first is None or here is None or not adds_nothing(here, self._captured):
            return False
        gone = self._idle | (first.calls_with_switches - here.calls_with_switches)
        for traced, other in self._by_answer(arguments, here):  # may make calls that this pass does not
            if traced is None or other is None or not adds_nothing(other, [*self._captured, traced]):
                return False
            if not traced.calls_with_switches - other.calls_with_switches <= gone | self._left_out:
                return False
        if any(path.calls_with_switches - here.calls_with_switches <= self._idle for path in self._captured):
            return True
        leaves = map(pytree.tree_leaves, replays)
        if all(values_at(self._program, self._model, some) is None for some in leaves):
            return False
        self._idle = gone
        return True

    def captured(self, arguments: Arguments) -> None:
        """Note that there is a capture for these arguments."""
        here = self._passes.path_of(arguments)
        if here is None:
            return
        self._captured.append(here)
        for traced, other in self._by_answer(arguments, here):
            if traced is not None and other is not None:
                self._captured.append(other)
                self._left_out |= traced.calls_with_switches - other.calls_with_switches

    def _by_answer(
        self, arguments: Arguments, here: ExecutionPath
    ) -> list[tuple[ExecutionPath | None, ExecutionPath | None]]:
        """Return the paths at the traced size and here, for either answer to all conditions on values.

        Without such conditions the list is empty.
        """
        paths = [here, *([] if self._first is None else [self._first])]
        answers = (True, False) if any("bool" in path.questions for path in paths) else ()
        return [
            (self._passes.path_of(self._given, answer=one), self._passes.path_of(arguments, answer=one))
            for one in answers
        ]


def adds_nothing(path: ExecutionPath, others: Iterable[ExecutionPath]) -> bool:
    """Whether each call of a pass was made in other passes too, with the same numbers and switches."""
    others = list(others)
    numbers = "numbers" if any(one.lengths == path.lengths for one in others) else "numbers_but_lengths"
    return all(
        getattr(path, part) <= set[Any]().union(*(getattr(one, part) for one in others))
        for part in ("distinct_calls", numbers, "calls_with_switches")
    )
