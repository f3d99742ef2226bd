"""Sizes at which code only leaves calls out: does a program that makes these calls hold there too?"""

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
    """What is known of the calls that code leaves out at some sizes.

    A size at which the code makes no call that is new needs no capture of its own if the first program gives
    there what the model gives: then the calls that are left out change nothing. Nor does a size at which only
    such calls are left out, beside those of another captured size.
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
            first: The path of the pass that the program holds.
        """
        self._model, self._program, self._passes = model, program, passes
        self._given, self._first = given, first
        self._known = [] if first is None else [first]  # paths of what was captured
        self._idle = set[Any]()  # calls that change nothing
        self._left_out = set[Any]()  # at captured sizes, with other answers to conditions on values

    def explain(self, arguments: Arguments, replays: Iterable[Arguments]) -> bool:
        """Whether these arguments need no capture.

        Args:
            arguments: Arguments of another size.
            replays: The same, or arguments with the same calls: the program is run on these.
        """
        first, here = self._first, self._passes.path_of(arguments)
        if first is None or here is None or not adds_nothing(here, self._known):
            return False
        gone = self._idle | (first.calls_with_switches - here.calls_with_switches)
        for one, two in self._sides(arguments, here):  # which may ask for calls that this pass has not made
            if one is None or two is None or not adds_nothing(two, [*self._known, one]):
                return False
            if not one.calls_with_switches - two.calls_with_switches <= gone | self._left_out:
                return False
        if any(one.calls_with_switches - here.calls_with_switches <= self._idle for one in self._known):
            return True
        leaves = map(pytree.tree_leaves, replays)
        if all(values_at(self._program, self._model, one) is None for one in leaves):
            return False
        self._idle = gone
        return True

    def captured(self, arguments: Arguments) -> None:
        """Note that there is a capture for these arguments."""
        here = self._passes.path_of(arguments)
        if here is None:
            return
        self._known.append(here)
        for one, two in self._sides(arguments, here):
            if one is not None and two is not None:
                self._known.append(two)
                self._left_out |= one.calls_with_switches - two.calls_with_switches

    def _sides(
        self, arguments: Arguments, here: ExecutionPath
    ) -> list[tuple[ExecutionPath | None, ExecutionPath | None]]:
        """Return the paths with either answer to conditions on values: at the traced size, and here."""
        paths = [here, *([] if self._first is None else [self._first])]
        answers = (True, False) if any("bool" in path.questions for path in paths) else ()
        return [
            (self._passes.path_of(self._given, answer=t), self._passes.path_of(arguments, answer=t))
            for t in answers
        ]


def adds_nothing(path: ExecutionPath, known: Iterable[ExecutionPath]) -> bool:
    """Whether each call of a pass was made by passes that are known, with the same numbers and switches."""
    known = list(known)
    numbers = "numbers" if any(one.lengths == path.lengths for one in known) else "numbers_but_lengths"
    return all(
        getattr(path, what) <= set[Any]().union(*(getattr(one, what) for one in known))
        for what in ("distinct_calls", numbers, "calls_with_switches")
    )
