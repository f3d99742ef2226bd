"""Refit the layers of a pruned network one after the other, in order of execution.

A layer is refitted if its output differs from its target. The input X is the pruned network's own input
of the layer, after the layers before it were refitted. The target Y is the dense output, corrected for
errors in a residual stream (`target`). The method decides what is fitted:

- ``reconstruct``: weight and bias by ridge least squares, ``||W X + b - Y||^2 + damping ||W - W0||^2``.
  W0 is the weight after pruning. Cross-validation chooses the damping (`regression.leastsquares`).
  Sources: He et al. 2017, Channel Pruning for Accelerating Very Deep Neural Networks (arXiv 1707.06168),
  section 3.1, and Luo et al. 2017, ThiNet (arXiv 1707.06342), section 3.2, refit to the dense outputs.
  Departures: damping towards W0, and targets that take the rest of a sum into account.
- ``bias``: the bias alone, so that the mean of each output equals the target's mean.
- ``variance``, ``channelwise`` and ``layerwise``: bias and a factor (`moments.py`).

If a layer has no bias and only a batch norm reads its output, the running mean of that norm takes the
bias (with opposite sign).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from secateur.calibration import Calibration
from secateur.common.mapped import any_mapped, release
from secateur.common.progress import bar
from secateur.graph.graph import Graph
from secateur.repairs.moments import channelwise, layerwise, mean, variance
from secateur.repairs.notes import Fitted
from secateur.repairs.pairs import Pair, Pairs
from secateur.repairs.regression.layers import Site
from secateur.repairs.regression.leastsquares import Fit, Sums, fit
from secateur.repairs.rows import column_sums, output_sums, target
from secateur.repairs.tasks import Task, is_ready, siblings_among, start_of, tasks_of
from secateur.signals.distributed import Team, team_of_processes
from secateur.signals.journal import (
    Step,
    checked_notes,
    current_journal,
    model_digest,
    plan_digest,
    require_like,
)
from secateur.stream.dense import Values
from secateur.stream.pending import PendingBatches
from secateur.targets.units.record import record_of

PARTS = 4
"""Number of parts for cross-validation. Layers that are large, or have plenty of data, get two parts."""

LARGE = 2048
"""A layer with more input columns than this is large: each part holds a matrix [columns, columns]."""

PLENTY = 32
"""Data are plenty with this many positions per input column."""

ROWS = 100
"""A fit reads about this many positions per input column. If there are more, each sample gives a random
part of its positions."""

_ROUNDING = 4
"""An output counts as undamaged up to this relative error, in multiples of the dtype's epsilon."""

FACTORS = {"bias": mean, "variance": variance, "channelwise": channelwise, "layerwise": layerwise}
"""Methods that scale each output: they regress the target on the pruned output, one column per output.
Other methods regress the target on the layer's input."""


@torch.no_grad()
def sweep(
    name: str, small: nn.Module, graph: Graph, calibration: Calibration, *, progress: bool = False
) -> dict[str, dict[str, float | None]]:
    """Refit the layers of a pruned model, in place.

    Several processes (see `secateur.signals.distributed`) share the batches. The first one fits each layer to
    the sums of all, and sends the result to the others.

    Args:
        name: The method, such as ``reconstruct``.
        small: The pruned model, in any form.
        graph: The trace of the dense model.
        calibration: Inputs. Labels are not read.
        progress: Show a progress bar on a terminal.

    Returns:
        For each refitted weight, by name: its ``damping`` (None if the weight did not change), and its
        squared error ``before`` and ``after``, divided by the scatter of the targets.
    """
    steps = _journal_steps(name, small, graph, calibration)
    pairs = Pairs(graph, small)
    pair = pairs.first
    regress = FACTORS.get(name)
    report = {}
    in_files = any_mapped(graph.program.state_dict.values())
    with (
        team_of_processes(graph.device) as team,
        PendingBatches(pairs.of, graph.device, calibration, in_files, team.takes) as batches,
    ):
        # Counting samples reads all the data once, so it is done only for the methods that need it.
        with team.together():
            samples = 0 if regress else calibration.repeats * calibration.samples()
        state = _Sweep(pair, batches, regress, samples, team, in_files=in_files)
        found = [*state.tasks(pair).values()]
        # If a program writes in place, the input of siblings may be overwritten between them.
        alone = regress is not None or bool(pair.writes)
        for siblings in bar([[t] for t in found] if alone else siblings_among(found, pair), name, progress):
            step = steps([pair.names[task.weight] for task in siblings])
            known = step.load(state.from_journal) if step else None
            if known is not None:
                report.update(state.restore(siblings, *known))
                continue
            found_now = state.refit(siblings)
            if step is not None:
                step.save({"found": found_now, "near": state.near}, state.results(siblings, found_now))
            report.update(found_now)
    pair.store(small)
    return report


def _journal_steps(
    name: str, small: nn.Module, graph: Graph, calibration: Calibration
) -> Callable[[Sequence[str]], Step | None]:
    """Return a function: names of weights -> the journal's step that refits them, or None without journal."""
    journal = current_journal()
    if journal is None:
        return lambda weights: None
    plan = plan_digest(record_of(small).plan)
    dense = journal.dense(graph.program.state_dict)
    before = (name, model_digest(small), plan, dense, journal.data(calibration))
    return lambda weights: journal.step("refit", *before, *weights)


@dataclass(eq=False)
class _Sweep:
    """The state of a sweep.

    Attributes:
        pair: The programs for the traced input size.
        batches: The data, advanced to the layer that the sweep has reached.
        regress: A function of `FACTORS`, or None for a fit on the layer's input.
        samples: The number of samples; 0 if `regress` is given, which does not need it.
        team: The processes that share the batches.
        near: The damping that the previous fit chose. The next search starts there.
        in_files: Whether weights stay in files.
    """

    pair: Pair
    batches: PendingBatches[Pair]
    regress: Callable[[Sequence[Sums], Tensor, Tensor | None, bool], Fit] | None
    samples: int
    team: Team
    near: float | None = None
    in_files: bool = False
    _tasks: dict[Pair, dict[str, Task]] = field(default_factory=dict)

    def tasks(self, pair: Pair) -> dict[str, Task]:
        """Return the tasks of a pair of programs by the weight's name, in order of execution.

        A program for another input size may run the layers in another order. Batches only move forward, so
        tasks of such a program that would need to move back are left out.
        """
        if pair not in self._tasks:
            found = {pair.names[task.weight]: task for task in tasks_of(pair)}
            if pair is not self.pair:
                reached = -1
                for name in self.tasks(self.pair):
                    if name in found and (start := start_of(found[name], pair)) >= reached:
                        reached = start
                    else:
                        found.pop(name, None)
            self._tasks[pair] = found
        return self._tasks[pair]

    def _visit(self, names: Sequence[str]) -> Iterator[tuple[int, Pair, list[Task], Values]]:
        """Advance all batches to the first call of some weights.

        Batches whose program does not use the weights are skipped.

        Yields:
            Each batch's index, programs, tasks in the order of the names, and values.
        """

        def place(pair: Pair) -> int | None:
            known = self.tasks(pair)
            if any(name not in known for name in names):
                return None
            start = min(start_of(known[name], pair) for name in names)
            ready = len(names) == 1 or all(is_ready(known[name], pair, start) for name in names)
            return start if ready else None

        for index, pair, values in self.batches.visit(place):
            yield index, pair, [self.tasks(pair)[name] for name in names], values

    def refit(self, siblings: Sequence[Task]) -> dict[str, dict[str, float | None]]:
        """Refit weights that read the same input, and write them to the pruned program.

        Returns:
            ``damping``, ``before`` and ``after`` as in `sweep`, by the weight's name. A weight is left out
            if its output is already right, or if some values are not finite.
        """
        pair = self.pair
        with self.team.together():
            mine = self._damaged([pair.names[task.weight] for task in siblings])
        damaged = set().union(*self.team.everyone(mine))
        siblings = [task for task in siblings if pair.names[task.weight] in damaged]
        if not siblings:
            return {}
        with self.team.together():
            local = self._parts([pair.names[task.weight] for task in siblings])
        sums = self._of_all(local)
        if self.in_files:
            release(pair.tensors_read(pair.nodes[: start_of(siblings[0], pair)]))
        found: dict[str, dict[str, float | None]] = {}
        with self.team.together():
            if self.team.rank == 0:
                found = self._solve_each(siblings, sums)
        found = self.team.from_first(found)
        for task in siblings if self.team.size > 1 else ():
            if pair.names[task.weight] in found:
                for node in filter(None, (task.weight, task.bias, task.norm)):
                    pair.replace(node, self.team.tensor_from_first(pair.tensor(node)))
        return found

    def results(self, siblings: Sequence[Task], found: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the tensors that `refit` wrote, by their names."""
        pair = self.pair
        changed = [task for task in siblings if pair.names[task.weight] in found]
        nodes = [n for task in changed for n in (task.weight, task.bias, task.norm) if n is not None]
        return {pair.names[node]: pair.tensor(node) for node in nodes}

    def restore(
        self,
        siblings: Sequence[Task],
        found: dict[str, dict[str, float | None]],
        near: float | None,
        tensors: Mapping[str, Tensor],
    ) -> dict[str, dict[str, float | None]]:
        """Write the tensors that `refit` found in a killed run.

        The batches still run through the layers before, with the weights of that time. So the values that the
        next fit reads are the same, bit for bit.
        """
        pair, self.near = self.pair, near
        if tensors:
            with self.team.together():
                for _ in self._visit([pair.names[task.weight] for task in siblings]):
                    pass
            for task in siblings:
                for node in filter(None, (task.weight, task.bias, task.norm)):
                    if pair.names[node] in tensors:
                        pair.replace(node, tensors[pair.names[node]].to(pair.graph.device))
            if self.in_files:
                release(pair.tensors_read(pair.nodes[: start_of(siblings[0], pair)]))
        return found

    def from_journal(
        self, notes: Any, tensors: dict[str, Tensor]
    ) -> tuple[dict[str, dict[str, float | None]], float | None, dict[str, Tensor]]:
        """Make the arguments of `restore` from saved notes and tensors."""
        pair, fitted = self.pair, checked_notes(Fitted, notes)
        wanted = {name: pair.tensor(node) for node, name in pair.names.items() if name in tensors}
        found = {name: entry.model_dump() for name, entry in fitted.found.items()}
        return found, fitted.near, require_like(tensors, wanted)

    def _of_all(self, parts: Sequence[Sums | None]) -> list[Sums]:
        """Return the sums of each part over all processes; nothing on any but the first process."""
        if self.team.size == 1:
            return [part for part in parts if part is not None]
        states = self.team.to_first(
            {f"{k} {n}": t for k, part in enumerate(parts) if part for n, t in part.state().items()}
        )
        found: dict[str, Sums] = {}
        for state in states:
            by_part: dict[str, dict[str, Tensor]] = {}
            for key, tensor in state.items():
                k, name = key.split()
                by_part.setdefault(k, {})[name] = tensor
            for k, tensors in by_part.items():
                sums = Sums.of_state(tensors, self.pair.graph.device)
                found[k] = found[k] + sums if k in found else sums
        return [found[k] for k in sorted(found)]

    def _solve_each(
        self, siblings: Sequence[Task], sums: Sequence[Sums]
    ) -> dict[str, dict[str, float | None]]:
        """Fit each of some weights to its share of the sums; see `refit`."""
        found, start = {}, 0
        for task in siblings:
            own, stop = sums, start + self._matrix(task).shape[2]
            if len(siblings) > 1:
                own = [part.of_outputs(torch.arange(start, stop, device=part.x.device)) for part in sums]
            start = stop
            if sums and all(part.finite() for part in own):
                entry = self._solve(task, own)
                if entry is not None:
                    found[self.pair.names[task.weight]] = entry
        return found

    def _matrix(self, task: Task) -> Tensor:
        """Return a task's weight as a matrix. [groups, columns, outputs]"""
        first = task.sites[0]
        return first.layer.matrix(self.pair.tensor(first.weight), self.pair.planned[first.node])

    def _solve(self, task: Task, sums: Sequence[Sums]) -> dict[str, float | None] | None:
        """Fit one weight to its sums, and write it to the pruned program."""
        pair, first = self.pair, task.sites[0]
        call, tensor = pair.planned[first.node], pair.tensor(first.weight)
        weight = self._matrix(task).double()
        bias = None if task.bias is None else pair.tensor(task.bias).double().reshape(len(weight), -1)
        intercept = task.bias is not None or task.norm is not None
        if self.regress is not None:
            outputs = len(weight) * weight.shape[2]
            bias = None if bias is None else bias.reshape(outputs, 1)
            found = self.regress(sums, weight.new_ones(outputs, 1, 1), bias, intercept)
            if found.bias is None and bool((found.weight == 1).all()):
                return None
            weight = weight * found.weight.reshape(len(weight), 1, -1)
        else:
            found = fit(sums, weight, bias, intercept, _unmasked_entries(task, pair), near=self.near)
            weight = found.weight
        damping = found.damping if math.isfinite(found.damping) else None
        self.near = damping or self.near
        pair.replace(task.weight, first.layer.unmatrix(weight, tensor, call))
        if found.bias is not None and task.bias is not None:
            pair.replace(task.bias, found.bias.reshape(-1))
        elif found.bias is not None and task.norm is not None:  # the norm subtracts its mean
            pair.replace(task.norm, pair.tensor(task.norm).double() - found.bias.reshape(-1))
        return {"damping": damping, "before": found.before, "after": found.after}

    def _damaged(self, names: list[str]) -> list[str]:
        """Return the weights whose output differs from its target on any batch, in order.

        Weights of several calls are taken as damaged.
        """
        found = {name for name in names if len(self.tasks(self.pair)[name].sites) > 1}
        for _, pair, tasks, values in self._visit(names):
            for name, task in zip(names, tasks, strict=True):
                if name in found:
                    continue
                (site,), (addition,) = task.sites, task.sums
                wanted = target(site, addition, pair, values)
                got = pair.small_value(site.node, values)
                tolerance = _ROUNDING * torch.finfo(wanted.dtype).eps * _norm(wanted)
                if not _norm(wanted - got) <= tolerance:
                    found.add(name)
            if len(found) == len(names):
                break
        return [name for name in names if name in found]

    def _parts(self, names: Sequence[str]) -> list[Sums | None]:
        """Accumulate the sums of the regressions of some weights over this process's batches, and all calls.

        Batch k, with all its views, goes to part k modulo the number of parts, for cross-validation. The
        outputs of the weights lie one after another.
        """
        columns = 1 if self.regress else self._matrix(self.tasks(self.pair)[names[0]]).shape[1]
        most = -(-ROWS * columns // max(1, self.samples))
        parts: list[Sums | None] = []
        for index, pair, tasks, values in self._visit(names):
            generator = torch.Generator().manual_seed(index)
            several = len(tasks[0].sites) > 1
            here = values.fork() if several else values
            for calls in zip(*(zip(task.sites, task.sums, strict=True) for task in tasks), strict=True):
                site, addition = calls[0]
                if several:
                    pair.advance(here, pair.index[site.node])
                parts = parts or [None] * self._part_count(pair, site, columns, here)
                found = (
                    output_sums(site, addition, tasks[0], pair, here)
                    if self.regress
                    else column_sums(calls, tasks, pair, here, generator, most)
                )
                for sums in found:
                    k = index // self.batches.repeats % len(parts)
                    known = parts[k]
                    parts[k] = sums if known is None else known + sums
        return parts

    def _part_count(self, pair: Pair, site: Site, columns: int, values: Values) -> int:
        """Return the number of parts for cross-validation."""
        if self.regress:
            return PARTS
        y = pair.dense_value(site.node, values)
        positions = self.samples * site.positions(pair.planned[site.node], pair.tensor(site.weight), y)
        return PARTS if columns <= LARGE and positions < PLENTY * columns else 2


def _unmasked_entries(task: Task, pair: Pair) -> Tensor | None:
    """Return a boolean matrix of the weight's entries that may change; None if all may.

    An entry that is zero in the pruned model and not in the dense one was masked, and must stay zero.
    """
    first = task.sites[0]
    small, dense = pair.tensor(first.weight), pair.dense_tensor(first.weight)
    free = (small != 0) | (dense == 0)
    return None if bool(free.all()) else first.layer.matrix(free, pair.planned[first.node])


def _norm(x: Tensor) -> float:
    single = x if x.dtype == torch.float64 or x.is_complex() else x.float()
    return float(torch.linalg.vector_norm(single))
