"""One sweep through a pruned network in which each layer is set right, given those before it.

In order of execution, every layer that gives anything else than it should is refitted: from the pruned
network's own input of the layer, which the layers before it have already been refitted to produce, to
what the layer should give (`target`). How is the method's choice:

- ``reconstruct``: weight and bias by ridge least squares, ``||W X + b - Y||^2 + damping ||W - W0||^2``
  with W0 what pruning left and the damping chosen by cross-validation (`secateur.regression.leastsquares`).
  Sources: He et al. 2017, Channel Pruning for Accelerating Very Deep Neural Networks (arXiv 1707.06168),
  section 3.1, and Luo et al. 2017, ThiNet (arXiv 1707.06342), section 3.2, refit to the dense outputs.
  Departures: damping towards W0, and targets that take the rest of a sum into account.
- ``bias``: the bias alone, so that each output's mean is what it should be.
- ``variance``, ``channelwise`` and ``layerwise``: bias and a factor, so that mean and variance are
  (`moments.py`).

A layer without a bias whose output goes into a batch norm alone gets one in form of that norm's mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from secateur.calibration import Calibration
from secateur.graph.graph import Graph
from secateur.progress import bar
from secateur.regression.additions import Addition, addition_after
from secateur.regression.layers import Site
from secateur.regression.leastsquares import Fit, Sums, fit
from secateur.repair.moments import channelwise, layerwise, mean, variance
from secateur.repair.pairs import Pair, Pairs, Values
from secateur.repair.pending import PendingBatches

PARTS = 4
"""Into how many parts the batches are dealt for cross-validation, ..."""

LARGE = 2048
"""... where a layer has at most this many columns; else two: each part holds a matrix of that size."""

ROWS = 100
"""Positions for each column that a fit reads, where the data hold more: of each sample some, at random."""

_ROUNDING = 4
"""Relative error, in units of the last place, up to which an output counts as undamaged."""

_FAINT = 1e-3
"""Channels whose factor on the way to the addition is smaller than this, relative to the largest, keep
their plain target: to correct a sum through them would take huge weights."""


@dataclass(frozen=True)
class Task:
    """A weight to refit, with all calls of it.

    Attributes:
        sites: The calls, in order.
        sums: For each, the addition whose result it should get right, if any.
        bias: The bias that is refitted with it, if any.
        norm: The running mean of the batch norm that takes the bias of a layer without one, if any.
    """

    sites: tuple[Site, ...]
    sums: tuple[Addition | None, ...]
    bias: fx.Node | None
    norm: fx.Node | None

    @property
    def weight(self) -> fx.Node:
        """The weight's placeholder."""
        return self.sites[0].weight


def tasks(pair: Pair) -> list[Task]:
    """Every weight that only layers read, in order of execution."""
    by_weight: dict[fx.Node, list[Site]] = {}
    for node in pair.nodes:
        site = Site.of(node, pair.planned[node], pair)
        if site is not None:
            by_weight.setdefault(pair.same(site.weight)[0], []).append(site)
    found = []
    for sites in by_weight.values():
        nodes = {site.node for site in sites}
        # Values are looked at ahead of several calls: writing in place would spoil those they share.
        if not pair.readers(sites[0].weight) <= nodes or (len(sites) > 1 and pair.writes):
            continue
        biases = {site.bias for site in sites}
        bias = next(iter(biases)) if len(biases) == 1 else None
        if bias is not None and not pair.readers(bias) <= nodes:
            bias = None
        norm = _norm_after(sites[0].node, pair) if biases == {None} and len(sites) == 1 else None
        found.append(Task(tuple(sites), tuple(addition_after(s, pair) for s in sites), bias, norm))
    return found


def _norm_after(node: fx.Node, pair: Pair) -> fx.Node | None:
    """The running mean of the batch norm that alone reads a node and alone holds that mean."""
    users = list(node.users)
    if len(users) != 1 or str(users[0].target) != "aten.batch_norm.default" or users[0].args[5] is not False:
        return None
    mean: Any = users[0].args[3]
    return mean if pair.is_tensor(mean) and pair.readers(mean) == {users[0]} else None


FACTORS = {"bias": mean, "variance": variance, "channelwise": channelwise, "layerwise": layerwise}
"""The methods that regress each output of the layer itself, one column for each: the weight is a factor."""


@torch.no_grad()
def sweep(
    name: str, small: nn.Module, graph: Graph, calibration: Calibration, *, progress: bool = False
) -> dict[str, dict[str, float | None]]:
    """Refit the layers of a pruned model, in place.

    Args:
        name: The method.
        small: The pruned model, in any form.
        graph: The trace of the dense model.
        calibration: Inputs; labels are not read.
        progress: Show a bar on a terminal.

    Returns:
        For each refitted weight its ``damping``, None where the weight stayed, and its error ``before``
        and ``after``, relative to the scatter of the targets.
    """
    pairs = Pairs(graph, small)
    pair = pairs.first
    regress = FACTORS.get(name)
    # Reads the data once more, and only fits ask for it.
    samples = 0 if regress else sum(batch.size for batch in calibration.batches())
    report = {}
    with PendingBatches(pairs, calibration) as batches:
        walk = _Sweep(pair, batches, regress, samples)
        for task in bar([*walk.tasks(pair).values()], name, progress):
            found = walk.refit(task)
            if found is not None:
                report[pair.names[task.weight]] = found
    pair.store(small)
    return report


@dataclass(eq=False)
class _Sweep:
    """What every layer's turn needs.

    Attributes:
        pair: The programs of the traced sizes.
        batches: The data, run as far as the sweep has come.
        regress: Of `FACTORS`; None for a fit on the layer's input.
        samples: How many samples there are; read by fits only.
        near: The damping that the fit before chose: the search for the next starts there.
    """

    pair: Pair
    batches: PendingBatches
    regress: Callable[[Sequence[Sums], Tensor, Tensor | None, bool], Fit] | None
    samples: int
    near: float | None = None
    _tasks: dict[Pair, dict[str, Task]] = field(default_factory=dict)

    def tasks(self, pair: Pair) -> dict[str, Task]:
        """The tasks of a pair of programs by the name of the weight, in order of execution.

        In programs of other sizes those count that come in the order of the traced ones.
        """
        if pair not in self._tasks:
            found = {pair.names[task.weight]: task for task in tasks(pair)}
            if pair is not self.pair:
                reached = -1
                for name in self.tasks(self.pair):
                    if name in found and (start := _start(found[name], pair)) >= reached:
                        reached = start
                    else:
                        found.pop(name, None)
            self._tasks[pair] = found
        return self._tasks[pair]

    def _visit(self, name: str) -> Iterator[tuple[int, Pair, Task, Values]]:
        """Each batch that reaches a weight, with its programs and the calls of the weight there."""

        def place(pair: Pair) -> int | None:
            task = self.tasks(pair).get(name)
            return None if task is None else _start(task, pair)

        for index, pair, values in self.batches.visit(place):
            yield index, pair, self.tasks(pair)[name], values

    def refit(self, task: Task) -> dict[str, float | None] | None:
        """Refit one weight; None if it is right as it is, or its values are not finite."""
        pair, first = self.pair, task.sites[0]
        name = pair.names[task.weight]
        if not self._damaged(name):
            return None
        call, tensor = pair.planned[first.node], pair.tensor(first.weight)
        weight = first.layer.matrix(tensor, call).double()
        given = self._parts(name)
        if not given or not all(part.finite() for part in given):
            return None
        bias = None if task.bias is None else pair.tensor(task.bias).double().reshape(len(weight), -1)
        intercept = task.bias is not None or task.norm is not None
        if self.regress is not None:
            outputs = len(weight) * weight.shape[2]
            bias = None if bias is None else bias.reshape(outputs, 1)
            found = self.regress(given, weight.new_ones(outputs, 1, 1), bias, intercept)
            if found.bias is None and bool((found.weight == 1).all()):
                return None
            weight = weight * found.weight.reshape(len(weight), 1, -1)
        else:
            found = fit(given, weight, bias, intercept, _free(task, pair), near=self.near)
            weight = found.weight
        damping = found.damping if math.isfinite(found.damping) else None
        self.near = damping or self.near
        pair.replace(task.weight, first.layer.unmatrix(weight, tensor, call))
        if found.bias is not None and task.bias is not None:
            pair.replace(task.bias, found.bias.reshape(-1))
        elif found.bias is not None and task.norm is not None:
            pair.replace(task.norm, pair.tensor(task.norm).double() - found.bias.reshape(-1))
        return {"damping": damping, "before": found.before, "after": found.after}

    def _damaged(self, name: str) -> bool:
        """Whether a layer gives anything else than it should on any batch, as far as a single call shows."""
        for _, pair, task, values in self._visit(name):
            if len(task.sites) > 1:
                return True
            (site,), (addition,) = task.sites, task.sums
            wanted = target(site, addition, pair, values)
            got = pair.small_value(site.node, values)
            tolerance = _ROUNDING * torch.finfo(wanted.dtype).eps * wanted.double().norm()
            if not bool((wanted.double() - got.double()).norm() <= tolerance):
                return True
        return False

    def _parts(self, name: str) -> list[Sums]:
        """Sums over all batches and calls, dealt into a few parts."""
        by_output = self.regress is not None
        columns = 1 if by_output else self.pair.tensor(self.tasks(self.pair)[name].weight)[0].numel()
        parts: list[Sums | None] = [None] * (PARTS if columns <= LARGE else 2)
        most = -(-ROWS * columns // max(1, self.samples))
        for index, pair, task, values in self._visit(name):
            generator = torch.Generator().manual_seed(index)
            here = values.fork() if len(task.sites) > 1 else values
            for site, addition in zip(task.sites, task.sums, strict=True):
                pair.advance(here, pair.index[site.node])
                for sums in sums_of(
                    site, addition, task, pair, here, generator, by_output=by_output, most=most
                ):
                    k = index % len(parts)
                    known = parts[k]
                    parts[k] = sums if known is None else known + sums
        return [part for part in parts if part is not None]


def _start(task: Task, pair: Pair) -> int:
    """The position of a task's first call."""
    return min(pair.index[site.node] for site in task.sites)


def sums_of(
    site: Site,
    addition: Addition | None,
    task: Task,
    pair: Pair,
    values: Values,
    generator: torch.Generator,
    *,
    by_output: bool,
    most: int,
) -> Iterator[Sums]:
    """Sums over one batch, a few samples at a time, of each at most so many positions for a fit."""
    call, tensor = pair.planned[site.node], pair.tensor(site.weight)
    wanted = target(site, addition, pair, values)
    x: Tensor = pair.small_value(site.node if by_output else site.x, values)
    bias = None if site.bias is None else pair.tensor(site.bias)
    for a, b in site.pieces(call, tensor, x, wanted, most=None if by_output else most):
        places = None if by_output else site.draw(call, tensor, b, most, generator)
        y = site.layer.targets(b, tensor, call, places)
        if bias is not None and task.bias is None:  # it is not refitted
            y = y - bias.reshape(len(y), 1, -1)
        if not by_output:
            yield Sums.of(site.layer.columns(a, tensor, call, places), y)
            continue
        own = site.layer.targets(a, tensor, call)
        if bias is not None:
            own = own - bias.reshape(len(own), 1, -1)
        yield Sums.of(*(v.transpose(1, 2).flatten(0, 1)[..., None] for v in (own, y)))


def _free(task: Task, pair: Pair) -> Tensor | None:
    """Entries that may change: those that a mask has set to zero may not."""
    first = task.sites[0]
    small, dense = pair.tensor(first.weight), pair.dense_tensor(first.weight)
    free = (small != 0) | (dense == 0)
    return None if bool(free.all()) else first.layer.matrix(free, pair.planned[first.node])


@torch.no_grad()
def target(site: Site, addition: Addition | None, pair: Pair, values: Values) -> Tensor:
    """What the layer should give for one batch, at the kept positions, in the shape of its output.

    The dense program's output, as a rule. Where that goes into an addition whose other operand is there
    already, what the sum should be is known, and so is what the pruned program will add: the difference is
    the target. So each addition of a residual stream corrects what went wrong in the stream before it.
    """
    wanted: Tensor = pair.dense_value(site.node, values)
    if addition is None:
        return wanted
    zero = torch.zeros_like(wanted[:1])
    shift = pair.run_chain(addition.chain, site.node, zero, dense=False)
    factor = pair.run_chain(addition.chain, site.node, zero + 1, dense=False) - shift
    drift = pair.dense_value(addition.other, values) - pair.small_value(addition.other, values)
    if addition.chain:
        into = pair.run_chain(addition.chain, site.node, wanted, dense=True)
        corrected = (into + drift - shift) / factor
    else:
        corrected = wanted + drift
    return torch.where(factor.abs() > _FAINT * factor.abs().max(), corrected, wanted)
