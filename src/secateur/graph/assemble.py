"""From labels to groups: classes of labels become units, units with the same producers become groups."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import fx

from secateur.graph.costs import CostModel
from secateur.graph.groups import Frozen, Group, Left, Role, Site, Slice, Stage
from secateur.graph.labels import Labels, Reason
from secateur.graph.nodes import UNNAMED, where
from secateur.graph.rules.naming import ACTIVATIONS, NORMS, operator_name
from secateur.graph.rules.op import CONSUME, PRODUCE, Value, Walk
from secateur.graph.walk import Tensor

_ROLES: tuple[tuple[Role, int], ...] = (("produce", PRODUCE), ("consume", CONSUME))


@dataclass(frozen=True)
class Assembled:
    """Groups in order of execution, with the tables that other rooms need.

    Attributes:
        groups: All groups, those in `left` too.
        frozen: Parts of tensors that may not shrink.
        group_of: The number of each label's group, -1 for none. [labels]
        slot_of: The slot of each label, -1 for none: units numbered through all groups. [labels]
        left: Groups that are not to be pruned.
    """

    groups: tuple[Group, ...]
    frozen: tuple[Frozen, ...]
    group_of: NDArray[np.int64]
    slot_of: NDArray[np.int64]
    left: tuple[Left, ...]


def assemble(walk: Walk, tensors: list[Tensor], *, allow_inexact: bool) -> Assembled:
    """Turn what the walk learnt into groups; those in `left` are not to be pruned."""
    store = walk.store
    n = len(store)
    bits = np.zeros(n, dtype=np.int64)  # the role of each parameter position, by its own label
    for labels, bit in walk.roles:
        bits[labels[labels > 0]] |= bit
    _keep_what_only_code_holds(walk, tensors, bits)
    frozen_roots = walk.store.frozen_roots()
    is_frozen = np.zeros(n, dtype=bool)
    is_frozen[list(frozen_roots)] = True
    tensors = _by_use(tensors)
    root_of = store.find(np.arange(n, dtype=np.int64))
    group_of, unit_of, firsts = _partition(walk, tensors, root_of, bits, is_frozen)
    inexact: dict[int, list[str]] = {}
    for mixing, mixed in store.mixed().items():
        for g in np.unique(group_of[mixed]).tolist():
            if g >= 0:
                inexact.setdefault(g, []).append(_text(mixing.what, mixing.where))
    slices = _slices(tensors, root_of, bits, group_of, unit_of, len(firsts))
    sites = _sites(walk, group_of, unit_of, len(firsts))
    names = _names([slices[g] for g in range(len(firsts))])
    groups = tuple(
        Group(
            name=names[g],
            size=firsts[g],
            slices=tuple(slices[g]),
            sites=tuple(sites[g]),
            exact=g not in inexact,
            inexact_because=tuple(inexact.get(g, ())),
        )
        for g in range(len(firsts))
    )
    left = tuple(
        Left(g, reason)
        for g in groups
        if (reason := _why_left(g, walk, tensors, allow_inexact=allow_inexact))
    )
    frozen = _frozen(walk, tensors, root_of, frozen_roots)
    offsets = np.cumsum([0, *(g.size for g in groups)])
    member = group_of[root_of]
    slot_of = np.where(member >= 0, offsets[member] + unit_of[root_of], -1)
    return Assembled(groups, frozen, member, slot_of, left)


def _keep_what_only_code_holds(walk: Walk, tensors: list[Tensor], bits: NDArray[np.int64]) -> None:
    """Freeze what a tensor outside of the state dict consumes: no copy of the model could mask it."""
    because = walk.reasons.label(Reason("read by a tensor that is neither a parameter nor a buffer"))
    for tensor in tensors:
        if tensor.name.startswith(UNNAMED):
            for axis in tensor.axes:
                walk.store.freeze(axis[(bits[axis] & CONSUME) > 0], because)


def _why_left(group: Group, walk: Walk, tensors: list[Tensor], *, allow_inexact: bool) -> str:
    """Why a group is not offered for pruning; empty if it is."""
    if group.size == 1:
        return "a single unit" + _tied_together(group, walk, tensors)
    seen = {unit for site in group.sites for unit in site.unit.tolist()}
    if not group.of_role("produce") or len(seen) < group.size:
        return "no layer's output shows it"
    if not group.exact and not allow_inexact:
        return f"mixed by {'; '.join(group.inexact_because)}"
    return ""


def _tied_together(group: Group, walk: Walk, tensors: list[Tensor]) -> str:
    """Which operator makes one unit of several positions; empty if there is one position alone."""
    largest = max(group.slices, key=lambda piece: len(piece.position))
    axis = next(t for t in tensors if t.name == largest.tensor).axes[largest.axis]
    first, *others = axis[largest.position].tolist()
    place = walk.store.tied_by(first, others[0]) if others else None
    if place is None:
        return ""
    place = place.node
    elsewhere = place.graph is not tensors[0].node.graph
    return (
        f": {_text(operator_name(place), where(place))} ties {len(largest.position)} positions of "
        f"{largest.tensor}" + (" at another size of the inputs or in another mode" if elsewhere else "")
    )


def _text(what: str, where: str) -> str:
    return f"{what} at {where}" if where else what


def _by_use(tensors: list[Tensor]) -> list[Tensor]:
    """Tensors in the order in which the program first reads them."""
    if not tensors:
        return []
    order = {node: i for i, node in enumerate(tensors[0].node.graph.nodes)}
    return sorted(tensors, key=lambda t: min((order[u] for u in t.node.users), default=len(order)))


def _partition(
    walk: Walk,
    tensors: list[Tensor],
    root_of: NDArray[np.int64],
    bits: NDArray[np.int64],
    is_frozen: NDArray[np.bool_],
) -> tuple[NDArray[np.int64], NDArray[np.int64], list[int]]:
    """Number groups and units: a group is the classes that the same axes hold, in the same roles.

    So all units of a group cost the same, and each axis, of activations too, keeps some of every group
    it holds: no part of a split is ever empty. Classes are told apart by the exclusive or of one random
    number for each axis and role.
    """
    n = len(root_of)
    rng = np.random.default_rng(0)
    signature = np.zeros(n, dtype=np.uint64)
    worked = np.zeros(n, dtype=bool)
    for tensor in tensors:
        for axis in tensor.axes:
            live = axis[axis > 0]
            roles = bits[live]
            for role in np.unique(roles).tolist():
                mark = rng.integers(1, 2**63, dtype=np.uint64)
                signature[np.unique(root_of[live[roles == role]])] ^= mark
            worked[root_of[live[bits[live] > 0]]] = True
    for labels in {axis.tobytes(): axis for axis in _axes_of(list(walk.values.values()))}.values():
        signature[np.unique(root_of[labels[labels > 0]])] ^= rng.integers(1, 2**63, dtype=np.uint64)
    group_of = np.full(n, -1, dtype=np.int64)
    unit_of = np.full(n, -1, dtype=np.int64)
    numbers: dict[int, int] = {}
    sizes: list[int] = []
    for producing in (True, False):  # units are numbered along the first axis that produces them
        for tensor in tensors:
            for axis in tensor.axes:
                live = axis[axis > 0]
                live = live[(bits[live] & PRODUCE) > 0] if producing else live
                roots = root_of[live]
                roots = roots[(group_of[roots] < 0) & ~is_frozen[roots] & worked[roots]]
                for root in dict.fromkeys(roots.tolist()):
                    g = numbers.setdefault(int(signature[root]), len(sizes))
                    if g == len(sizes):
                        sizes.append(0)
                    group_of[root], unit_of[root] = g, sizes[g]
                    sizes[g] += 1
    return group_of, unit_of, sizes


def _axes_of(values: list[Value]) -> Iterator[Labels]:
    for value in values:
        if isinstance(value, tuple):
            yield from value
        elif isinstance(value, list):
            yield from _axes_of(value)


def _slices(
    tensors: list[Tensor],
    root_of: NDArray[np.int64],
    bits: NDArray[np.int64],
    group_of: NDArray[np.int64],
    unit_of: NDArray[np.int64],
    count: int,
) -> list[list[Slice]]:
    found: list[list[Slice]] = [[] for _ in range(count)]
    for tensor in tensors:
        for k, axis in enumerate(tensor.axes):
            roots = np.where(axis > 0, root_of[axis], 0)
            groups = group_of[roots]
            for g in np.unique(groups[groups >= 0]).tolist():
                member = groups == g
                for role, bit in (*_ROLES, ("scale", 0)):
                    chosen = member & ((bits[axis] & bit) > 0 if bit else bits[axis] == 0)
                    position = np.flatnonzero(chosen)
                    if len(position):
                        found[g].append(Slice(tensor.name, k, role, position, unit_of[roots[position]]))
    return found


def _names(slices: list[list[Slice]]) -> list[str]:
    """The module path of the first producer, numbered where groups share it."""
    names: list[str] = []
    taken: dict[str, int] = {}
    for members in slices:
        first = next((s for s in members if s.role == "produce"), members[0])
        path = first.tensor.rpartition(".")[0] or first.tensor
        taken[path] = taken.get(path, 0) + 1
        names.append(path if taken[path] == 1 else f"{path}#{taken[path]}")
    return names


def _sites(
    walk: Walk, group_of: NDArray[np.int64], unit_of: NDArray[np.int64], count: int
) -> list[list[Site]]:
    found: list[list[Site]] = [[] for _ in range(count)]
    for produced in walk.produced:
        start = produced.node
        if isinstance(walk.values[start], list):  # several outputs: the first that is read is passed on
            outputs = [u for u in start.users if operator_name(u) == "operator.getitem"]
            outputs.sort(key=lambda u: (not u.users, u.args[1]))
            if not outputs:
                continue
            start = outputs[0]
        producer = walk.names[produced.origin]
        for node, stage in _stages(start):
            axes = walk.values[node]
            if not isinstance(axes, tuple) or produced.axis >= len(axes):
                continue
            labels = axes[produced.axis]
            roots = np.where(labels > 0, walk.store.find(labels), 0)
            groups = group_of[roots]
            for g in np.unique(groups[groups >= 0]).tolist():
                position = np.flatnonzero(groups == g)
                found[g].append(
                    Site(node.name, produced.axis, stage, producer, position, unit_of[roots[position]])
                )
    return found


def _stages(start: fx.Node) -> list[tuple[fx.Node, Stage]]:
    """The producing node, then the normalisation and the activation that directly follow it."""
    stages: list[tuple[fx.Node, Stage]] = [(start, "produced")]
    norm = next((u for u in start.users if operator_name(u) in NORMS), None)
    if norm is not None:
        stages.append((norm, "normalised"))
    activation = next((u for u in stages[-1][0].users if operator_name(u) in ACTIVATIONS), None)
    if activation is not None:
        stages.append((activation, "activated"))
    return stages


def _frozen(
    walk: Walk, tensors: list[Tensor], root_of: NDArray[np.int64], frozen_roots: dict[int, int]
) -> tuple[Frozen, ...]:
    """Axes that hold frozen positions for a reason worth telling (kernel sizes are not)."""
    because = np.zeros(len(root_of), dtype=np.int64)
    roots = list(frozen_roots)
    because[roots] = [frozen_roots[r] for r in roots]
    found = []
    for tensor in tensors:
        for k, axis in enumerate(tensor.axes):
            live = axis[axis > 0]
            labels, counts = np.unique(because[root_of[live]], return_counts=True)
            for label, positions in zip(labels.tolist(), counts.tolist(), strict=True):
                if label < 0:
                    reason = walk.reasons[label]
                    found.append(Frozen(tensor.name, k, positions, reason.what, reason.where))
    return tuple(found)


def slots_of(assembled: Assembled, labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """The slot of each position along an axis, -1 for none."""
    return assembled.slot_of[np.maximum(labels, 0)]


def cost_model(assembled: Assembled, walk: Walk, tensors: list[Tensor], batch: int) -> CostModel:
    """Parameters and MACs as a function of the kept slots."""
    model = CostModel(sum(g.size for g in assembled.groups), batch)
    for tensor in tensors:
        if tensor.is_parameter:
            model.add("params", 1, [model.axis(slots_of(assembled, a)) for a in tensor.axes])
    for contraction in walk.contractions:
        axes = [model.axis(slots_of(assembled, a)) for a in contraction.axes]
        model.add("macs", contraction.factor, axes)
    return model
