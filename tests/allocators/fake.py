"""A graph built by hand: a chain of linear layers, whose cost is bilinear in what neighbours keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from secateur.allocators import Allocator, Limits
from secateur.graph.groups import Group, Slice
from secateur.graph.inputs import InputSpec
from secateur.measure.cost import Cost

INPUTS, OUTPUTS = 3, 10


class FakeGraph:
    """One group a layer; unit u of layer l feeds `repeat` positions of the next weight, as if flattened."""

    def __init__(self, sizes: Sequence[int], repeat: int = 2, area: int = 5) -> None:
        self.sizes, self.repeat, self.area = tuple(sizes), repeat, area
        self.groups = tuple(self._group(layer) for layer in range(len(self.sizes)))
        self.fingerprint = "f" * 60 + "".join(f"{size:04d}" for size in self.sizes)
        self.inputs = InputSpec.of((torch.zeros(1, INPUTS),), {})
        self.folded = ()
        self.granularity = "unit"
        self.costs_asked = 0

    def _group(self, layer: int) -> Group:
        size = self.sizes[layer]
        unit = np.arange(size)
        flat = np.arange(size * self.repeat)
        return Group(
            name=f"layer{layer}",
            size=size,
            slices=(
                Slice(f"layer{layer}.weight", 0, "produce", unit, unit),
                Slice(f"layer{layer}.bias", 0, "produce", unit, unit),
                Slice(f"layer{layer + 1}.weight", 1, "consume", flat, flat // self.repeat),
            ),
            sites=(),
            exact=True,
        )

    def adapted(self, rule: Allocator, limits: Limits) -> tuple[Allocator, Limits]:
        return rule, limits

    def cost(self, keep: Mapping[str, NDArray[np.bool_]] | None = None) -> Cost:
        self.costs_asked += 1
        keep = keep or {}
        kept = [int(keep[g.name].sum()) if g.name in keep else g.size for g in self.groups]
        rows = [*kept, OUTPUTS]
        columns = [INPUTS, *(k * self.repeat for k in kept)]
        weights = [r * c for r, c in zip(rows, columns, strict=True)]
        return Cost(params=sum(weights) + sum(rows), macs=sum(w * self.area for w in weights))

    def sweep(
        self, gone: Mapping[str, NDArray[np.int64]], stages: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        costs = [self.cost({name: when > stage for name, when in gone.items()}) for stage in range(stages)]
        return np.array([c.params for c in costs]), np.array([c.macs for c in costs])


def random_scores(
    graph: FakeGraph,
    seed: int,
    signals: Sequence[str] = ("wasserstein", "taylor", "magnitude"),
    *,
    ties: bool = False,
) -> dict[str, dict[str, NDArray[np.float64]]]:
    """Positive scores, independent between signals; with `ties` many are equal."""
    rng = np.random.default_rng(seed)

    def draw(size: int) -> NDArray[np.float64]:
        return rng.integers(0, 4, size).astype(np.float64) if ties else rng.uniform(0.1, 1.0, size)

    return {signal: {group.name: draw(group.size) for group in graph.groups} for signal in signals}


def reference_order(scores: NDArray[np.float64]) -> list[int]:
    """The order in which units go, as one would say it: lowest score first, of equal ones the last first."""
    return sorted(range(len(scores)), key=lambda i: (scores[i], -i))


def reference_tod(removal: NDArray[np.float64], protection: NDArray[np.float64], k: int) -> float:
    """ToD(k) as the paper writes it, with sets."""
    size = len(removal)
    r_u = {unit: rank for rank, unit in enumerate(reference_order(removal))}
    r_r = {unit: rank for rank, unit in enumerate(reference_order(protection))}
    first = {i for i in range(size) if r_u[i] < k}
    protected = {i for i in range(size) if r_r[i] >= size - k}
    return len(first & protected) / k
