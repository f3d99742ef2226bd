"""Score a model whose weights stay in files, part by part: each weight is read once for all batches.

Groups are scored in windows. A window starts with the first part in which one of its groups is observed, and
ends with the last one. So a signal's state is in memory only while these parts of the model run.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from secateur.calibration import Calibration
from secateur.common.mapped import any_mapped, release, trim
from secateur.common.progress import bar
from secateur.errors import CalibrationError
from secateur.graph.graph import Graph
from secateur.graph.groups import Group
from secateur.graph.nodes import draws_nothing
from secateur.signals.checkpoint import Values as Scored
from secateur.signals.distributed import Team
from secateur.signals.memory import Covers
from secateur.signals.onepass import OnePass
from secateur.signals.program import CapturedModel
from secateur.signals.signal import Signal, Step
from secateur.stream.calls import Call
from secateur.stream.dense import Dense, Show
from secateur.stream.parts import parts
from secateur.stream.pending import PendingBatches

Begin = Callable[[Covers, CapturedModel | None], OnePass]
"""Starts a pass for some groups, with the captured model of an earlier one."""


@dataclass(frozen=True)
class _Window:
    """Groups that are scored together, and the first and the last part in which they are observed."""

    covers: Covers
    first: int
    last: int


class _Program(Dense):
    """A program for one input size.

    Attributes:
        ends: The position where each part ends. All programs have the same parts.
        runner: Finds nodes by their names in the first program.
        first_names: Node -> its name in the first program.
    """

    def __init__(self, graph: Graph, program: ExportedProgram, model: CapturedModel) -> None:
        super().__init__(graph, program)
        self.ends: list[int] = []
        self.runner = model.use(program)
        self.first_names = {node: name for name, node in self.runner.nodes.items()}

    def position(self, name: str) -> int | None:
        """Return the position of a node by its name in the first program; None if it is not there."""
        node = self.runner.nodes.get(name)
        return None if node is None else self.index.get(node)

    def part_of(self, position: int) -> int:
        """Return the part that computes the node at a position."""
        return bisect_right(self.ends, position)

    def part_computing(self, name: str) -> int | None:
        """Return the part that computes a node; None if the program does not have it."""
        position = self.position(name)
        return None if position is None else self.part_of(position)

    def cut_like(self, other: _Program) -> None:
        """Use the same parts as another program. A part ends after the last node that both have in it."""
        reached = [0] * (len(other.nodes) + 1)
        for node, k in other.index.items():
            own = self.position(other.first_names[node]) if node in other.first_names else None
            reached[k + 1] = 0 if own is None else own + 1
        upto = list(accumulate(reached, max))
        self.ends = [upto[end] for end in other.ends]


class InParts:
    """Runs a model part by part, each over all batches, and scores the groups of each window."""

    def __init__(
        self, programs: Sequence[_Program], windows: Sequence[_Window], begin: Begin, model: CapturedModel
    ) -> None:
        """Use `InParts.of`. The batch with index k runs ``programs[k]``."""
        self._programs, self._windows, self._begin, self._model = programs, windows, begin, model

    @classmethod
    def of(cls, graph: Graph, signals: Sequence[Signal], data: Calibration, begin: Begin) -> InParts | None:
        """Prepare a run.

        Args:
            graph: From `sc.trace`.
            signals: All signals of the run.
            data: The batches.
            begin: Starts a pass; see `Begin`.

        Returns:
            None if the model cannot run in parts: its weights are in memory, a signal needs gradients or
            reads whole batches, a program draws random numbers or writes into its own values, or the
            programs for two input sizes call the layers in different orders.
        """
        if not any_mapped(graph.program.state_dict.values()):
            return None
        model = begin({signal.name: graph.groups[:1] for signal in signals}, None).model
        by_id: dict[int, _Program] = {}
        programs = []
        for batch in data.batches():
            program = graph.programs.of(batch.args, dict(batch.kwargs))
            if id(program) not in by_id:
                by_id[id(program)] = _Program(graph, program, model)
            programs.append(by_id[id(program)])
        trim()  # captures of further programs may have left freed memory with the process
        main, *others = by_id.values()
        if any(program.writes or _draws(program) for program in by_id.values()):
            return None
        spans: dict[tuple[int, int], list[Group]] = {}
        watched: set[str] = set()
        for group in graph.groups:
            one = begin({signal.name: (group,) for signal in signals}, model)
            at = sorted(p for name in one.watched if (p := main.position(name)) is not None)
            if not one.can_interleave or len(at) < len(one.watched):
                return None
            spans.setdefault((at[0], at[-1]) if at else (0, 0), []).append(group)
            watched.update(one.watched)
        # Nodes after the last observed one, such as the head of a language model, do not run.
        stop = max(last for _, last in spans) + 1
        main.ends = [*(end for end in parts(main) if end < stop), stop]
        for other in others:
            other.cut_like(main)
            for name in watched:
                if other.part_computing(name) != main.part_computing(name):
                    return None
        by_part: dict[tuple[int, int], list[Group]] = {}
        for (first, last), groups in spans.items():
            by_part.setdefault((main.part_of(first), main.part_of(last)), []).extend(groups)
        windows = [
            _Window({signal.name: tuple(groups) for signal in signals}, *span)
            for span, groups in by_part.items()
        ]
        return cls(programs, windows, begin, model)

    @torch.no_grad()
    def run(
        self,
        data: Calibration,
        team: Team,
        finish: Callable[[OnePass], Scored],
        progress: bool,
        known: Scored,
        note: Callable[[Scored], None],
    ) -> tuple[Scored, list[Step]]:
        """Score all groups.

        Args:
            data: The batches.
            team: The processes that share them.
            finish: Returns the scores of a pass, from all processes' shares.
            progress: Show a bar on a terminal.
            known: Scores from an earlier run. Their windows are not scored again, but batches still run
                through these parts if later ones need it.
            note: Called with all scores so far whenever there are new ones.

        Returns:
            The scores, by signal and group, and the steps of the batches that this process read.
        """
        found: Scored = {name: dict(by_group) for name, by_group in known.items()}
        windows = [window for window in self._windows if not _is_known(window, found)]
        begun = min((window.first for window in windows), default=0)
        with team.together():
            one = self._begin(self._windows[0].covers, self._model)
            steps = {batch.index: one.step(batch) for batch in data.batches(takes=team.takes)}
        if not windows:
            return found, list(steps.values())
        active: list[tuple[_Window, OnePass]] = []
        device = self._programs[0].graph.device
        count = len(self._programs[0].ends)
        with PendingBatches(
            lambda batch: self._programs[batch.index], device, data, True, team.takes
        ) as batches:
            for k in bar(range(begun, count), "Scoring, in parts", progress):
                with team.together():
                    for window in windows:
                        if window.first == k:
                            active.append((window, self._begin(window.covers, self._model)))
                            for step in steps.values():
                                active[-1][1].begin(step)
                    show = self._show_for(k, [one for _, one in active], steps)
                    for index, _, values in batches.visit(partial(_end, k), show):
                        if k == count - 1:
                            _check_finite(index, values.tensors())
                    for program in set(self._programs):
                        start = program.ends[k - 1] if k > begun else 0
                        release(program.tensors_read(program.nodes[start : program.ends[k]]))
                for window, one in active:
                    if window.last == k:
                        for name, by_group in finish(one).items():
                            found.setdefault(name, {}).update(by_group)
                left = [(window, one) for window, one in active if window.last != k]
                if len(left) < len(active):
                    note(found)
                active = left
        return found, list(steps.values())

    def _show_for(
        self, part: int, ones: Collection[OnePass], steps: Mapping[int, Step]
    ) -> Callable[[int], Show]:
        """Return a function from a batch's index to a function that shows the values of a part to passes."""

        def show(index: int) -> Show:
            program = self._programs[index]
            runner = self._model.use(program.program)
            start = program.ends[part - 1] if part else 0

            def see(node: fx.Node, value: Any, values: Mapping[fx.Node, Any]) -> None:
                name = program.first_names.get(node)
                if (
                    name is None or program.index[node] < start
                ):  # an earlier part runs again, because the disk was full
                    return
                for one in ones:
                    if name in one.watched:
                        one.show(name, value, runner.reader(name, values.__getitem__), steps[index])

            return see

        return show


def _is_known(window: _Window, found: Scored) -> bool:
    """Whether the scores of all groups of a window have been found."""
    return all(
        group.name in found.get(name, {}) for name, groups in window.covers.items() for group in groups
    )


def _end(part: int, program: _Program) -> int:
    return program.ends[part]


def _draws(dense: Dense) -> bool:
    """Whether the program draws random numbers."""
    return any(
        torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        and not draws_nothing(Call.captured(node).arguments())
        for node in dense.nodes
    )


def _check_finite(index: int, tensors: Sequence[Tensor]) -> None:
    if any(t.is_floating_point() and bool(t.isnan().any()) for t in tensors):
        raise CalibrationError(
            f"score, batch {index}: expected finite activations, got NaN. Check the data, and the model for "
            "overflow."
        )
