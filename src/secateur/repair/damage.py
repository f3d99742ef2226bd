"""What the loss of each unit does that refitting its consumers cannot undo.

A group's units are removed one after another, each time the one whose loss, after the consuming layers
have been refitted to the units that are left, adds the least error to their outputs. For least squares
that error is known without refitting: with H the scatter matrix of a consumer's inputs and W its refitted
weight, losing the columns c of a unit adds ``W_c^T (H^-1)_cc^-1 W_c``, and H^-1 and W follow by
elimination (the optimal brain surgeon of Hassibi and Stork 1993, for blocks of columns as in LeCun's
and Hassibi's second-order pruning of layers; here the loss of a layer is exactly quadratic).

A unit's value is the error after it and all units before it are gone, relative to the scatter of what the
consumer's output goes into: the sum of a residual stream, where it goes into one, else the output itself.
So values of all groups are on one scale: a threshold on them spreads what damage remains evenly.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from secateur.apply.apply import apply
from secateur.calibration import Calibration
from secateur.graph.graph import Graph
from secateur.graph.groups import Group, Slice
from secateur.plan import Plan
from secateur.repair.frontier import Frontier
from secateur.repair.layers import Site
from secateur.repair.leastsquares import Sums, total
from secateur.repair.sweep import pieces
from secateur.repair.targets import Sum, sum_after
from secateur.repair.twin import Twin, Values

DAMPING = 1e-4
"""Added to the scatter's diagonal, relative to its mean."""

STEPS = 128
"""Large groups lose several units between two eliminations, so that there are about this many."""


@dataclass
class _Consumer:
    """One group of columns of one consuming layer, while units are eliminated.

    Attributes:
        inverse: Of the damped scatter matrix; zero for columns that are gone. [columns, columns]
        weight: Refitted so far, in units in which the outputs' scatter is one. [columns, outputs]
        columns: Unit -> its columns.
    """

    inverse: Tensor
    weight: Tensor
    columns: dict[int, Tensor]

    def losses(self, units: list[int]) -> NDArray[np.float64]:
        """What losing each unit adds to the error, alone. [units]"""
        found = np.zeros(len(units))
        by_count: dict[int, list[int]] = {}
        for k, unit in enumerate(units):
            if unit in self.columns:
                by_count.setdefault(len(self.columns[unit]), []).append(k)
        for places in by_count.values():
            c = torch.stack([self.columns[units[k]] for k in places])
            weight = self.weight[c]
            solved = torch.linalg.solve(self.inverse[c[:, :, None], c[:, None, :]], weight)
            found[places] = (weight * solved).sum((1, 2)).cpu().numpy()
        return found

    def lose(self, units: list[int]) -> None:
        """Eliminate units."""
        found = [self.columns.pop(unit) for unit in units if unit in self.columns]
        if not found:
            return
        c = torch.cat(found)
        across = self.inverse[:, c]
        factor = torch.linalg.solve(across[c], torch.cat([self.weight[c], across.t()], 1))
        outputs = self.weight.shape[1]
        self.weight -= across @ factor[:, :outputs]
        self.inverse -= across @ factor[:, outputs:]
        self.weight[c] = 0
        self.inverse[c] = 0
        self.inverse[:, c] = 0


@torch.no_grad()
def damage(model: nn.Module, graph: Graph, calibration: Calibration) -> dict[str, NDArray[np.float64]]:
    """For each group that layers consume, each unit's value. [group.size]; large means worth more.

    Args:
        model: The dense model.
        graph: Its trace.
        calibration: Inputs; labels are not read.

    Returns:
        Group name -> value. Groups that something else than a layer consumes as well are left out.
    """
    whole = apply(model, Plan.build(graph, {}, allocator="none"), "masked", graph=graph)
    twin = Twin(graph, whole)
    sites: dict[str, list[Site]] = {}
    for node in twin.nodes:
        site = Site.of(node, twin)
        if site is not None:
            sites.setdefault(twin.names[twin.same(site.weight)[0]], []).append(site)
    wanted = {g.name: g for g in graph.groups if _consumed_by(sites, g)}
    names = {piece.tensor for g in wanted.values() for piece in g.of_role("consume")}
    chosen = sorted((s for n in names for s in sites[n]), key=lambda s: twin.index[s.node])
    walk = Frontier(twin, calibration)
    seen = {site.node: _gather(site, twin, walk) for site in chosen}
    found = {}
    for name, group in wanted.items():
        consumers: list[_Consumer] = []
        for piece in group.of_role("consume"):
            for site in sites[piece.tensor]:
                units = _units(piece, twin.tensor(site.weight))
                consumers += _consumers(site, twin, units, *seen[site.node])
        found[name] = _eliminate(group.size, consumers)
    return found


def _consumed_by(sites: dict[str, list[Site]], group: Group) -> bool:
    pieces_of = group.of_role("consume")
    return bool(pieces_of) and all(piece.tensor in sites for piece in pieces_of)


def _gather(site: Site, twin: Twin, walk: Frontier) -> tuple[Sums, Tensor, float]:
    """Sums of one layer over all batches, each output's factor on the way to a sum, and the sum's scatter."""
    addition = sum_after(site, twin)
    call, weight = twin.planned[site.node], twin.tensor(site.weight)
    whole: list[Sums] = []
    outputs: list[Sums] = []
    factors: list[Tensor] = []
    for _, values in walk.visit(twin.index[site.node]):
        x, y = twin.dense_value(site.x, values), twin.dense_value(site.node, values)
        into, scale = _into(site, addition, twin, values, y)
        if not factors:
            factors = [site.layer.targets(scale.expand(1, *y.shape[1:]), weight, call)[:, 0].double()]
        for a, b, c in pieces(site, twin, x, y, into):
            columns = site.layer.columns(a, weight, call)
            whole = [total([*whole, Sums.of(columns, site.layer.targets(b, weight, call))])]
            ends = site.layer.targets(c, weight, call)
            outputs = [total([*outputs, Sums.of(ends[:, :, :1], ends)])]
    return whole[0], factors[0], outputs[0].scatter(True)


def _into(site: Site, addition: Sum | None, twin: Twin, values: Values, y: Tensor) -> tuple[Tensor, Tensor]:
    """What a layer's output goes into, and the factor on the way there."""
    if addition is None:
        return y, torch.ones_like(y[:1])
    zero = torch.zeros_like(y[:1])
    at_zero, at_one, at_y = (
        twin.run_chain(addition.chain, site.node, v, dense=True) for v in (zero, zero + 1, y)
    )
    return at_y + twin.dense_value(addition.other, values), at_one - at_zero


def _units(piece: Slice, weight: Tensor) -> Tensor:
    """Which unit each entry of a weight reads; -1 for none."""
    found = torch.full(weight.shape, -1, dtype=torch.int64, device=weight.device)
    position = torch.as_tensor(piece.position, device=weight.device)
    unit = torch.as_tensor(piece.unit, device=weight.device)
    axis = piece.axis
    shape = [1] * weight.ndim
    shape[axis] = -1
    sizes = [n if k != axis else len(unit) for k, n in enumerate(weight.shape)]
    return found.index_copy(axis, position, unit.reshape(shape).expand(sizes))


def _consumers(
    site: Site, twin: Twin, units: Tensor, sums: Sums, factor: Tensor, scatter: float
) -> list[_Consumer]:
    call, weight = twin.planned[site.node], twin.tensor(site.weight)
    labels = site.layer.matrix(units, call)[:, :, 0].cpu()
    matrix = site.layer.matrix(weight, call).double()
    xx, _ = sums.centred(True)
    found = []
    for group in range(len(matrix)):
        columns = {int(u): (labels[group] == u).nonzero()[:, 0] for u in labels[group].unique() if u >= 0}
        if not columns:
            continue
        damped = xx[group].clone()
        damped.diagonal().add_(DAMPING * float(damped.diagonal().mean()) or 1.0)
        inverse = torch.linalg.inv(damped)
        scaled = matrix[group] * factor[group] / (scatter**0.5 or 1.0)
        found.append(_Consumer(inverse, scaled, columns))
    return found


def _eliminate(size: int, consumers: list[_Consumer]) -> NDArray[np.float64]:
    """The error after each unit is gone, of the greedy order."""
    alive, value, error = list(range(size)), np.zeros(size), 0.0
    while alive:
        losses = sum((c.losses(alive) for c in consumers), np.zeros(len(alive)))
        count = max(1, min(size // STEPS, len(alive)))
        order = np.argsort(losses, kind="stable")[:count]
        gone = [alive[k] for k in order]
        for k in order:
            error += float(losses[k])
            value[alive[k]] = error
        for consumer in consumers:
            consumer.lose(gone)
        alive = [unit for unit in alive if unit not in set(gone)]
    return value
