"""The trace of a factorised model: directions as units, and the costs of pairs of layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
from torch import nn

from secateur.common.models import named_tensors
from secateur.graph.costs import CostModel, Term
from secateur.graph.graph import Graph, fingerprint_of
from secateur.graph.groups import Group, Left, Site, Slice
from secateur.targets.lowrank.layers import replaceable
from secateur.targets.lowrank.pair import FIRST, SECOND, LowRank, most_directions, pairs_of

S = TypeVar("S", Slice, Site)


@dataclass(frozen=True, eq=False)
class RankGraph(Graph):
    """The directions of a factorised model's pairs as groups of units. Rules take it like any `Graph`.

    A pair is cheaper than its layer with at most r directions
    (`secateur.targets.lowrank.pair.most_directions`). So its group has r + 1 units: the first r directions,
    and all weaker ones together as the last unit, which is removed first. As long as that unit stays, the
    layer stays a single layer, and costs what it cost.

    Attributes:
        uncorrelated: Names of these groups. On the data that the directions come from, their units are
            uncorrelated, so errors add up.
    """

    granularity: ClassVar[Literal["rank"]] = "rank"  # type: ignore[assignment]

    uncorrelated: frozenset[str] = field(default=frozenset(), kw_only=True)


@dataclass(frozen=True, eq=False)
class UnitsAndRanks(RankGraph):
    """The directions of a factorised model's pairs, together with channels, neurons and heads."""

    granularity: ClassVar[Literal["unit+rank"]] = "unit+rank"  # type: ignore[assignment]


def rank_graph(graph: Graph, kind: type[RankGraph]) -> RankGraph:
    """The trace of a factorised model as one of ranks.

    Args:
        graph: The trace of its units.
        kind: `RankGraph` for the directions alone, `UnitsAndRanks` for all units.
    """
    model = graph.programs.model
    pairs = {} if model is None else pairs_of(model)
    starts = graph.slots
    directions: dict[str, Group] = {}
    jumps: dict[str, _Jump] = {}
    both = issubclass(kind, UnitsAndRanks)
    left = list(graph.left) if both else []
    for path, pair in pairs.items():
        own = next((g for g in graph.groups if _is_of(g, path, pair.rank)), None)
        if own is None:
            why = next((e.reason for e in graph.left if e.group.name == f"{path}.{FIRST}"), "")
            why = why or "its directions are no group of their own"
            left.append(Left(Group(path, pair.rank, (), (), exact=True), why))
            continue
        most = most_directions(pair)
        directions[own.name] = _joined(own, most)
        jumps[path] = _Jump(starts[own.name], pair.rank, most)
    if model is not None:
        reasons = replaceable(model)[1]
        left += [Left(Group(path, 1, (), (), exact=True), why) for path, why in reasons.items()]
    every = [directions.get(group.name, group) for group in graph.groups]
    kept = every if both else [g for g in every if g.name in directions]
    costs = _with_jumps(graph, pairs, jumps)
    values: dict[str, Any] = {f.name: getattr(graph, f.name) for f in fields(Graph)}
    values |= {"groups": tuple(kept), "left": tuple(left), "_costs": costs}
    values |= {} if both else {"frozen": ()}
    if model is not None:
        values["fingerprint"] = dense_fingerprint(model)
    return kind(**values, uncorrelated=frozenset(directions))


def dense_fingerprint(model: nn.Module) -> str:
    """The fingerprint of the dense model, in which each pair is the single layer that it was made of."""
    shapes = {name: tuple(tensor.shape) for name, tensor in named_tensors(model).items()}
    for path, pair in pairs_of(model).items():
        shapes = {name: shape for name, shape in shapes.items() if not name.startswith(f"{path}.")}
        shapes[f"{path}.weight"] = tuple(pair.weight.shape)
        if pair.bias is not None:
            shapes[f"{path}.bias"] = tuple(pair.bias.shape)
    return fingerprint_of(shapes)


def _is_of(group: Group, path: str, rank: int) -> bool:
    """Whether the units of a group are all directions of one pair, and nothing else."""
    own = (f"{path}.{FIRST}.weight", f"{path}.{FIRST}.bias", f"{path}.{SECOND}.weight")
    return (
        group.size == rank
        and bool(group.slices)
        and all(s.tensor in own and np.array_equal(s.position, s.unit) for s in group.slices)
    )


def _joined(group: Group, most: int) -> Group:
    """The group with one unit for all directions behind the first `most`."""

    def joined(part: S) -> S:
        return replace(part, unit=np.minimum(part.unit, most))

    return replace(
        group,
        size=most + 1,
        slices=tuple(map(joined, group.slices)),
        sites=tuple(map(joined, group.sites)),
    )


@dataclass(frozen=True)
class _Jump:
    """The slots of a pair's directions.

    Attributes:
        start: The first slot.
        rank: The number of directions.
        most: The number of directions that are units of their own.
    """

    start: int
    rank: int
    most: int


def _with_jumps(graph: Graph, pairs: Mapping[str, LowRank], jumps: Mapping[str, _Jump]) -> CostModel:
    """Costs by which a pair with all directions costs what its layer does.

    Let T be 1 while the last unit is there, and R the number of the other directions. Each term t with all
    directions of the pair as an axis becomes t(R) - T t(R), and T times the layer's own term is added. That
    is what the pair costs where T is 0, and what the layer does where it is 1, at any number of inputs and
    outputs.
    """
    costs = graph.costs
    terms = {kind: costs.terms(kind) for kind in ("params", "macs")}
    for path in jumps:
        jump = jumps[path]
        slots = np.arange(jump.start, jump.start + jump.rank, dtype=np.int64)
        every, some, last = (costs.axis(part) for part in (slots, slots[: jump.most], slots[jump.most :][:1]))
        layer = [t.axes for t in terms["params"] if every in t.axes and len(t.axes) > 1]
        into, out = (next(n for n in axes if n != every) for axes in layer[:2])
        for kind in terms:
            new: list[Term] = []
            seen = 0
            for factor, axes, origin in terms[kind]:
                if every not in axes:
                    new.append(Term(factor, axes, origin))
                    continue
                fewer = tuple(some if n == every else n for n in axes)
                new += [Term(factor, fewer, origin), Term(-factor, (last, *fewer), origin)]
                if into in axes or out in axes:
                    if seen % 2 == 0:  # the first layer of the pair; the second one's is the same
                        whole = (last, *(out if n == every else n for n in axes))
                        new.append(Term(factor, whole, origin))
                    seen += 1
            terms[kind] = new
    return costs.with_terms(terms)
