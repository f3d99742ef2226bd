"""What scoring takes, by signal: formulas read from `src/secateur/signals`, around a simulated pass."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.scale.least_squares import eliminate
from benchmarks.scale.passes import forward, forward_backward, producing
from benchmarks.scale.subject import Subject
from benchmarks.scale.work import Work, total
from secateur.graph.groups import Group
from secateur.graph.nodes import hint
from secateur.repairs.regression.layers import Site
from secateur.signals.units.reconstruction import POSITIONS, SHARE, _Layers
from secateur.signals.units.wasserstein import Wasserstein
from secateur.stream.calls import Call

CHUNK = 1 << 23
"""Entries of columns that are made at a time (`repairs/regression/layers.py`)."""

COMPARED = 2**22
"""Most float64 numbers that `signals/units/wasserstein.py` compares at a time."""


def taylor(subject: Subject) -> Work:
    """`signals/units/taylor.py`: forward and backward, and every product of weight and gradient in float64.

    Each batch converts both (2 · (item + 8) bytes a weight), multiplies (24) and sums (8). Held are all
    gradients, and for one tensor at a time 24 bytes a weight; between batches, 8 bytes a unit.
    """
    tensors = subject.graph.program.state_dict
    sizes = {name: (tensors[name].numel(), tensors[name].itemsize) for name in producing(subject)}
    passed = forward_backward(subject)
    moved = sum(n * (2 * (item + 8) + 32) for n, item in sizes.values())
    held = sum(n * item for n, item in sizes.values())
    peak = max((24 * n for n, _ in sizes.values()), default=0)
    products = Work({"bytes": moved, "calls": 5 * len(sizes)}, held + peak)
    return (passed + products) * batches(subject.samples, subject)


def batches(samples: int, subject: Subject) -> float:
    """How many batches so many samples are."""
    return samples / subject.batch


def kept_samples(subject: Subject, samples: int, signal: Wasserstein) -> int:
    """Samples that the U-Score keeps: the first of each class."""
    return min(samples, subject.classes * signal.per_class)


@dataclass(frozen=True)
class Observed:
    """What the U-Score sees at one site.

    Attributes:
        entries: Units, or parts of them.
        map: Numbers of one entry of one sample.
    """

    entries: int
    map: int

    @classmethod
    def all(cls, subject: Subject, signal: Wasserstein) -> list[Observed]:
        """At every site of every group."""
        nodes = {
            node.name: node.meta["val"] for node in subject.graph.program.graph.nodes if "val" in node.meta
        }
        found = []
        for group in subject.graph.groups:
            for site in signal.sites(group):
                shape = [hint(n) for n in nodes[site.node].shape]
                of_a_sample = torch.Size(shape).numel() // hint(nodes[site.node].shape[0])
                found.append(cls(len(site.unit), of_a_sample // shape[site.axis]))
        return found

    def projections(self, signal: Wasserstein) -> int:
        """One for single numbers."""
        return 1 if self.map == 1 else signal.projections


def wasserstein(subject: Subject, visited: float = 0.0, signal: Wasserstein | None = None) -> Work:
    r"""`signals/units/wasserstein.py`: forward, projections of kept samples, sorting, and comparing classes.

    Of n kept samples, e entries, maps of M numbers and P projections: n · e · M · P multiply-adds (P = 1
    without a map), n · e · P numbers sorted, and for K classes of s samples, points of P · s coordinates:
    K² · P · s · e differences up to 64 classes; with more, at least 69 · K (the mean, four anchors and one
    block of 64), and at most half of all pairs beside these.

    Held: the kept samples, 4 · n · e · P bytes over all sites, and while a site is compared 32 MiB of
    points, three times, or those of one entry.

    Args:
        subject: What is scored.
        visited: Share of the pairs that cannot be skipped, where there are more than 64 classes.
        signal: Its settings.
    """
    signal = signal or Wasserstein()
    n, classes = kept_samples(subject, subject.samples, signal), subject.classes
    size = max(1, n // classes)
    passed = forward(subject) * batches(subject.samples, subject)
    amounts: Counter[str] = Counter()
    held = widest = 0
    for seen in Observed.all(subject, signal):
        p = seen.projections(signal)
        points = n * seen.entries * p
        amounts["matmul float32"] += points * seen.map
        amounts["bytes"] += 8 * n * seen.entries * seen.map + 4 * 12 * points
        amounts["sorted"] += points
        pairs = classes**2 if classes <= 64 else 69 * classes + visited * classes**2 / 2
        amounts["differences"] += pairs * p * size * seen.entries
        chunk = max(1, COMPARED // (classes * (p * size + classes)))
        amounts["calls"] += 20 * -(-seen.entries // chunk)
        held += 4 * points
        widest = max(widest, 24 * min(chunk, seen.entries) * classes * p * size)
    return passed.beside(held) + Work(dict(amounts), held + widest)


@dataclass(frozen=True)
class Reader:
    """A layer's call that reads a group, as regressions.

    Attributes:
        layer: The call.
        parts: Of a grouped convolution; else 1.
        columns: Inputs of each.
        outputs: Of each.
        positions: Of a sample.
    """

    layer: Site
    parts: int
    columns: int
    outputs: int
    positions: int

    @classmethod
    def of(cls, layers: Any, layer: Site) -> Reader:
        """From the captured program."""
        call, weight = Call.captured(layer.node), layers.tensor(layer.weight).to("meta")
        parts, columns, outputs = layer.layer.matrix(weight, call).shape
        value = layer.node.meta["val"]
        shape = [hint(n) for n in value.shape]
        positions = torch.Size(shape).numel() // shape[0] // (parts * outputs)
        return cls(layer, parts, columns, outputs, positions)

    @property
    def rows(self) -> int:
        """Positions of a sample that are read."""
        return min(self.positions, max(POSITIONS, self.columns // SHARE))

    @property
    def state(self) -> int:
        """Bytes of the sums that are kept and sent between processes: counts, columns, products, ends."""
        return 8 * (2 + self.parts * (self.columns + self.columns**2 + 2 * self.outputs))


def readers(subject: Subject) -> dict[str, list[Reader]]:
    """By group; the same call may read several groups."""
    layers = _Layers(subject.graph)
    made: dict[Site, Reader] = {}

    def reader(site: Site) -> Reader:
        if site not in made:
            made[site] = Reader.of(layers, site)
        return made[site]

    return {
        group.name: [reader(site) for site in layers.readers(group) if isinstance(site, Site)]
        for group in subject.graph.groups
    }


def reconstruction(subject: Subject) -> Work:
    r"""`signals/units/reconstruction.py`: forward, products of every reader's columns, eliminations.

    Of r rows (positions of all samples, at most 64 of each or a quarter of the columns) and c columns: r ·
    c² multiply-adds in float32, after r · c numbers were gathered; the outputs are summed at every
    position. Then `least_squares.eliminate` for each group that a layer reads.

    Held: 8 · c² bytes for each reader, all at once; while a group is finished its covariances and
    eliminations.
    """
    by_group = readers(subject)
    unique = list({id(r): r for found in by_group.values() for r in found}.values())
    passed = forward(subject)
    summed = total(_summed(r, subject) for r in unique)
    held = sum(r.state for r in unique)
    gathered = Work((passed + summed).amounts, passed.peak + summed.peak) * batches(subject.repaired, subject)
    return gathered.beside(held) + total(_finished(g, by_group[g.name]) for g in subject.graph.groups).beside(
        held
    )


def _summed(reader: Reader, subject: Subject) -> Work:
    """One batch's sums of one reader."""
    rows = subject.batch * reader.rows * reader.parts
    c = reader.columns
    ends = subject.batch * reader.positions * reader.parts * reader.outputs
    of_a_piece = max(1, CHUNK // max(1, reader.positions * c))
    pieces = -(-subject.batch // of_a_piece)
    moved = 4 * 3 * rows * c + ends * (4 + 4 * 8) + pieces * (4 + 16) * reader.parts * c * c
    peak = 4 * reader.rows * min(of_a_piece, subject.batch) * reader.parts * c + 4 * reader.parts * c * c
    return Work({"matmul float32": rows * c * (c + 1), "bytes": moved, "calls": 20 * pieces + 8}, peak)


def _finished(group: Group, found: list[Reader]) -> Work:
    """One group's elimination."""
    works = []
    for reader in found:
        units = max(1, group.size // reader.parts)
        each = max(1, reader.columns // units)
        works.append(eliminate(units, each, reader.columns, reader.outputs) * reader.parts)
    amounts = total(works).amounts
    covariance = 3 * 8 * sum(r.parts * r.columns**2 for r in found)
    return Work(amounts, sum(w.peak for w in works) + covariance)
