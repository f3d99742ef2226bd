"""What repairs take: the sweep walked on the meta device, beside formulas for its fits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.scale.least_squares import TRIED, fit, merging
from benchmarks.scale.passes import forward
from benchmarks.scale.scoring import batches
from benchmarks.scale.simulation import Meter
from benchmarks.scale.subject import Subject, storages
from benchmarks.scale.work import Work, total
from secateur.calibration import Batch
from secateur.measure.cost import weight_bytes
from secateur.repairs.sweep import FACTORS, LARGE, PARTS, ROWS, Task, sums_of, target, tasks
from secateur.stream.dense import Values
from secateur.stream.pairs import Pair
from secateur.stream.pending import HELD_BYTES


def batchnorm(subject: Subject) -> Work:
    """`repairs/batchnorm.py`: the pruned network forward, once over the data, its norms as in evaluation."""
    return forward(subject, subject.small) * batches(subject.repaired, subject)


@dataclass(frozen=True)
class Stop:
    """Where the sweep refits a weight.

    Attributes:
        step: Both networks from the stop before to this one, one batch.
        looked: What the layer should give and what it gives, compared; one batch.
        known: The part of `looked` and `summed`, and of the next `step`, that a held batch does once for all.
        summed: The sums of one batch.
        pieces: In how many parts these come.
        held: Bytes of a batch's values that later layers still read, with what is known.
        filed: The same without.
        damaged: Whether anything before it was pruned, so that it is refitted.
        fitted: The fit.
    """

    step: Work
    looked: Work
    known: Work
    summed: Work
    pieces: int
    held: int
    filed: int
    damaged: bool
    fitted: Work


def sweep(subject: Subject, name: str, tried: int = TRIED, limit: int = HELD_BYTES) -> Work:
    """`repairs/sweep.py`: every layer behind the first pruned one, in order, on both networks side by side.

    A stop visits every batch (is it damaged? the first batch says so, if it is; then the sums). Batches whose
    values between two stops fit `limit` together are kept in memory, those of the others in files. What a
    visit makes of the dense network's layer is kept with the values in memory, but not in files.

    Held: the pruned network's copy, the values of batches (at most `limit`, and one batch that is walked),
    sums and fit of one layer.
    """
    count = max(1, round(batches(subject.repaired, subject)))
    works, held_before, known_before, filed_before, walking = [], 0, Work(), 0, 0
    for stop in walked(subject, name, tried):
        walking = max(walking, stop.step.peak)
        room = min(count, limit // max(1, stop.held))
        here = stop.step * count + known_before * -held_before
        here += Work({"filed": filed_before * (count - held_before) + stop.filed * (count - room)})
        here += stop.looked * (1 if stop.damaged else count)
        if stop.damaged:
            again = 1 if room else 0  # the first batch is looked at, then summed
            here += stop.summed * count + stop.known * -again + stop.fitted
            here += Work({"filed": stop.filed * (1 - again)})
        values = min(limit, room * stop.held) + max(walking, stop.held)
        works.append(Work(here.amounts, max(stop.looked.peak, stop.summed.peak, stop.fitted.peak) + values))
        held_before, known_before, filed_before = room, stop.known, stop.filed
    return total(works).beside(weight_bytes(subject.small))


def walked(subject: Subject, name: str, tried: int = TRIED) -> Iterator[Stop]:
    """Every stop, with one batch on the meta device."""
    pair, by_output = Pair(subject.graph, subject.small), name in FACTORS
    values = pair.start(Batch.of(subject.inputs(subject.batch), 0))
    generator = torch.Generator().manual_seed(0)
    damaged = False
    with torch.no_grad():
        for task in tasks(pair):
            site, addition = task.sites[0], task.sums[0]
            with Meter() as stepping:
                pair.advance(values, pair.index[site.node])
            with Meter() as knowing:
                pair.dense_value(site.node, values.fork())
            ahead = values.fork()
            with Meter() as looking:
                _compare(task, pair, ahead)
            columns = pair.tensor(site.weight)[0].numel()
            damaged = damaged or columns < pair.dense_tensor(site.weight)[0].numel() or _cut(task, pair)
            most = -(-ROWS * columns // max(1, subject.repaired))
            pieces: list[Any] = []
            with Meter() as summing:
                for sums in sums_of(
                    site, addition, task, pair, values.fork(), generator, by_output=by_output, most=most
                ):
                    pieces.append((sums.count, sums.rows is not None))
                    del sums
            yield Stop(
                stepping.work(),
                looking.work(),
                knowing.work(),
                summing.work(),
                len(pieces),
                storages(ahead.tensors()),
                storages(values.tensors()),
                damaged,
                _fitted(task, pair, pieces, subject, by_output=by_output, tried=tried),
            )


def _compare(task: Task, pair: Pair, values: Values) -> None:
    """As `sweep._damaged`, without its answer."""
    site, addition = task.sites[0], task.sums[0]
    wanted, got = target(site, addition, pair, values), pair.small_value(site.node, values)
    wanted.double().norm(), (wanted.double() - got.double()).norm()


def _cut(task: Task, pair: Pair) -> bool:
    """Whether a layer reads fewer inputs than its dense one did."""
    node = task.weight
    return bool(pair._dense[node].shape[1:] != pair.tensor(node).shape[1:])


def _fitted(
    task: Task, pair: Pair, pieces: list[Any], subject: Subject, *, by_output: bool, tried: int
) -> Work:
    """Merging the sums of all batches, and the fit."""
    site = task.sites[0]
    matrix = site.layer.matrix(pair.tensor(site.weight), pair.planned[site.node])
    groups, columns, outputs = matrix.shape
    count = max(1, round(batches(subject.repaired, subject)))
    many = len(pieces) * count
    if by_output:
        return merging(groups * outputs, 1, 1, many)
    rows = sum(n for n, _ in pieces) * count
    split = min(count, PARTS if columns <= LARGE else 2)
    intercept = task.bias is not None or task.norm is not None
    few = rows <= columns
    of_a_part = -(-rows // split) if few else 0
    fitted = fit(groups, columns, outputs, split, rows=of_a_part, intercept=intercept, tried=tried)
    if few:
        return fitted
    products = merging(groups, columns, outputs, many)
    if any(is_rows for _, is_rows in pieces):
        products += Work({"matmul float64": groups * rows * columns * (columns + outputs)})
    return products + fitted
