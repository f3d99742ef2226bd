"""Score a model that lies in files part by part: its weights are read once for all batches.

Groups are scored in windows. A window starts with the first part that shows one of its groups and ends with
the last one. So what a signal accumulates is held only while its part of the model runs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from secateur.calibration import Calibration
from secateur.common.mapped import any_mapped, release
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
    """Groups that are scored together, and the first and the last part that show them."""

    covers: Covers
    first: int
    last: int


class InParts:
    """Runs a model part by part, each over all batches, and scores the groups of each window."""

    def __init__(
        self,
        dense: Dense,
        ends: Sequence[int],
        windows: Sequence[_Window],
        begin: Begin,
        model: CapturedModel,
    ) -> None:
        """Use `InParts.of`."""
        self._dense, self._ends, self._windows = dense, ends, windows
        self._begin, self._model = begin, model

    @classmethod
    def of(cls, graph: Graph, signals: Sequence[Signal], data: Calibration, begin: Begin) -> InParts | None:
        """Prepare a run.

        Args:
            graph: From `sc.trace`.
            signals: All of the run.
            data: The batches.
            begin: See `Begin`.

        Returns:
            None if the model has to run whole: if its weights lie in memory, a signal needs gradients or
            looks at a whole batch first, the program draws random numbers or writes into its own values, or
            another program is needed for some batch.
        """
        if not any_mapped(graph.program.state_dict.values()):
            return None
        dense = Dense(graph)
        if dense.writes or _draws(dense):
            return None
        place = {node.name: k for node, k in dense.index.items()}
        first = begin({signal.name: graph.groups[:1] for signal in signals}, None)
        spans: dict[tuple[int, int], list[Group]] = {}
        for group in graph.groups:
            one = begin({signal.name: (group,) for signal in signals}, first.model)
            at = sorted(place[name] for name in one.watched if name in place)
            if not one.takes_turns or len(at) < len(one.watched):
                return None
            spans.setdefault((at[0], at[-1]) if at else (0, 0), []).append(group)
        if any(graph.programs.of(b.args, dict(b.kwargs)) is not graph.program for b in data.batches()):
            return None
        # What comes after the last place that is shown, such as the head of a language model, does not run.
        stop = max(last for _, last in spans) + 1
        ends = [*(end for end in parts(dense) if end < stop), stop]
        by_part: dict[tuple[int, int], list[Group]] = {}
        for span, groups in spans.items():
            start, last = (next(k for k, end in enumerate(ends) if at < end) for at in span)
            by_part.setdefault((start, last), []).extend(groups)
        windows = [
            _Window({signal.name: tuple(groups) for signal in signals}, *span)
            for span, groups in by_part.items()
        ]
        return cls(dense, ends, windows, begin, first.model)

    @torch.no_grad()
    def run(
        self,
        data: Calibration,
        team: Team,
        finish: Callable[[OnePass], Scored],
        progress: bool,
    ) -> tuple[Scored, list[Step]]:
        """Score all groups.

        Args:
            data: The batches.
            team: The processes that share them.
            finish: Returns the scores of a pass, from all processes' shares.
            progress: Show a bar on a terminal.

        Returns:
            The scores, by signal and group, and the steps of the batches that this process read.
        """
        dense, found = self._dense, Scored()
        with team.together():
            asked = self._begin(self._windows[0].covers, self._model)
            steps = {batch.index: asked.step(batch) for batch in data.batches(takes=team.takes)}
        active: list[tuple[_Window, OnePass]] = []
        start = 0
        with PendingBatches(lambda batch: dense, dense.graph.device, data, True, team.takes) as batches:
            for k, end in enumerate(bar(self._ends, "Scoring, in parts", progress)):
                with team.together():
                    for window in self._windows:
                        if window.first == k:
                            active.append((window, self._begin(window.covers, self._model)))
                            for step in steps.values():
                                active[-1][1].begin(step)
                    show = _shower(dense, start, [one for _, one in active], steps)
                    for index, _, values in batches.visit(partial(_at, end), show):
                        if end == self._ends[-1]:
                            _check_finite(index, values.tensors())
                    release(dense.tensors_read(dense.nodes[start:end]))
                for window, one in active:
                    if window.last == k:
                        for name, by_group in finish(one).items():
                            found.setdefault(name, {}).update(by_group)
                active = [(window, one) for window, one in active if window.last != k]
                start = end
        return found, list(steps.values())


def _at(position: int, dense: Dense) -> int:
    return position


def _shower(
    dense: Dense, start: int, ones: Collection[OnePass], steps: Mapping[int, Step]
) -> Callable[[int], Show]:
    """Return, for the index of a batch, what shows the values of nodes from position `start` on."""

    def show(index: int) -> Show:
        def see(node: fx.Node, value: Any, values: Mapping[fx.Node, Any]) -> None:
            if dense.index[node] < start:  # computed again, since the disk was full
                return
            for one in ones:
                if node.name in one.watched:
                    one.show(node.name, value, values.__getitem__, steps[index])

        return see

    return show


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
