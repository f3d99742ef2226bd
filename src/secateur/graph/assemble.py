"""Build groups from labels.

Positions whose labels were tied form a *class*: they can only be removed together. A class that holds
positions of parameters is a *unit*. Units that lie along the same axes, in the same roles, are a *group*.
"""

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
from secateur.graph.rules.op import CONSUME, MATCH, PRODUCE, Value, Walk
from secateur.graph.walk import Tensor

_UNPACKING = frozenset(
    f"aten.{name}" for name in ("cat.default", "index_select.default", "reshape.default", "transpose.int")
)
"""Operators by which packed rows become sequences of their samples again."""

_ROLES: tuple[tuple[Role, int], ...] = (
    ("produce", PRODUCE),
    ("consume", CONSUME),
    ("match", MATCH),
)


@dataclass(frozen=True)
class Assembled:
    """The groups, and tables that say which group each label belongs to.

    Attributes:
        groups: All groups in order of execution, also those in `left`.
        frozen: Parts of tensors that may not shrink.
        group_of: For each label, the number of its group, or -1. [labels]
        slot_of: For each label, the number of its unit, counted through all groups, or -1. [labels]
        left: Groups of which no unit may be removed, and why.
        head_sizes: Names of the groups whose units are dimensions of attention heads.
    """

    groups: tuple[Group, ...]
    frozen: tuple[Frozen, ...]
    group_of: NDArray[np.int64]
    slot_of: NDArray[np.int64]
    left: tuple[Left, ...]
    head_sizes: frozenset[str] = frozenset()


def assemble(walk: Walk, tensors: list[Tensor], *, allow_inexact: bool) -> Assembled:
    """Build groups from what the rules said. With `allow_inexact`, mixed groups may be pruned too."""
    store = walk.store
    n = len(store)
    # Roles belong to single positions: a unit is produced at one and consumed at another. So they are kept
    # by the label of the position, not by its class.
    bits = np.zeros(n, dtype=np.int64)
    for labels, bit in walk.roles:
        bits[labels[labels > 0]] |= bit
    _keep_what_only_code_holds(walk, tensors, bits)
    frozen_roots = walk.store.frozen_roots()
    is_frozen = np.zeros(n, dtype=bool)
    is_frozen[list(frozen_roots)] = True
    tensors = _by_use(tensors)
    root_of = store.find(np.arange(n, dtype=np.int64))
    bits[np.isin(root_of, _roots(walk, walk.matched)) & ((bits & PRODUCE) > 0)] |= MATCH
    group_of, unit_of, sizes = _partition(walk, tensors, root_of, bits, is_frozen)
    inexact: dict[int, list[str]] = {}
    for mixing, mixed in store.mixed().items():
        for g in np.unique(group_of[mixed]).tolist():
            if g >= 0:
                inexact.setdefault(g, []).append(_text(mixing.what, mixing.where))
    slices = _slices(tensors, root_of, bits, group_of, unit_of, len(sizes))
    sites = _sites(walk, group_of, unit_of, len(sizes))
    names = _names([slices[g] for g in range(len(sizes))])
    groups = tuple(
        Group(
            name=names[g],
            size=sizes[g],
            slices=tuple(slices[g]),
            sites=tuple(sites[g]),
            exact=g not in inexact,
            inexact_because=tuple(inexact.get(g, ())),
        )
        for g in range(len(sizes))
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
    sized = np.unique(group_of[_roots(walk, walk.dimensions)])
    return Assembled(
        groups, frozen, member, slot_of, left, frozenset(names[g] for g in sized.tolist() if g >= 0)
    )


def _keep_what_only_code_holds(walk: Walk, tensors: list[Tensor], bits: NDArray[np.int64]) -> None:
    """Freeze units that are read by a tensor outside the state dict: no copy of the model can mask it."""
    because = walk.reasons.label(Reason("read by a tensor that is neither a parameter nor a buffer"))
    for tensor in tensors:
        if tensor.name.startswith(UNNAMED):
            for axis in tensor.axes:
                walk.store.freeze(axis[(bits[axis] & CONSUME) > 0], because)


def _why_left(group: Group, walk: Walk, tensors: list[Tensor], *, allow_inexact: bool) -> str:
    """Say why no unit of a group may be removed; empty if units may."""
    if group.size == 1:
        return "a single unit" + _tied_together(group, walk, tensors)
    seen = {unit for site in group.sites for unit in site.unit.tolist()}
    if not group.of_role("produce") or len(seen) < group.size:
        return "no layer's output shows it"
    if not group.exact and not allow_inexact:
        return f"mixed by {'; '.join(group.inexact_because)}"
    return ""


def _roots(walk: Walk, found: list[Labels]) -> Labels:
    """Return the roots of the live labels among these."""
    roots = walk.store.find(np.concatenate([*found, np.zeros(0, np.int64)]))
    return np.unique(roots[roots > 0])


def _tied_together(group: Group, walk: Walk, tensors: list[Tensor]) -> str:
    """Say which operator makes one unit of several positions; empty if there is only one position."""
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
    """Sort tensors by the order in which the program first reads them."""
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
    """Number the groups, and the units in each group.

    A group is all classes that lie along the same axes, of parameters and of activations, in the same roles.
    So all units of a group cost the same. And since every group keeps at least one unit, every axis does: no
    part of a split is ever empty.

    To compare sets of axes quickly, each axis and role gets a random number of 64 bits. The signature of a
    class is the exclusive or of the numbers of all axes that it lies along. Classes with equal signatures
    form a group.

    Args:
        walk: What the rules said.
        tensors: The tensors of the program, in order of use.
        root_of: For each label, the label that stands for its class. [labels]
        bits: For each label, the role of its position. [labels]
        is_frozen: For each root, whether its class is frozen. [labels]

    Returns:
        For each root the number of its group and of its unit there, -1 for none, [labels] each; and the size
        of each group.
    """
    n = len(root_of)
    rng = np.random.default_rng(0)
    signature = np.zeros(n, dtype=np.uint64)
    worked = np.zeros(n, dtype=bool)  # classes that some layer produces or consumes
    for tensor in tensors:
        for axis in tensor.axes:
            live = axis[axis > 0]
            roles = bits[live]
            for role in np.unique(roles).tolist():
                mark = rng.integers(1, 2**63, dtype=np.uint64)
                # Without `unique`, a class that lies along an axis twice would cancel its own mark.
                signature[np.unique(root_of[live[roles == role]])] ^= mark
            worked[root_of[live[bits[live] > 0]]] = True
    # Equal axes, such as those on both sides of an activation, count once.
    for labels in {axis.tobytes(): axis for axis in _axes_of(list(walk.values.values()))}.values():
        signature[np.unique(root_of[labels[labels > 0]])] ^= rng.integers(1, 2**63, dtype=np.uint64)
    group_of = np.full(n, -1, dtype=np.int64)
    unit_of = np.full(n, -1, dtype=np.int64)
    numbers: dict[int, int] = {}
    sizes: list[int] = []
    # Units are numbered along the first axis that produces them, so that unit k is output k of a layer. The
    # second round numbers the units that no layer produces.
    for producing in (True, False):
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
    """Find the places of each group in tensors: for each axis, one slice for each role."""
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
    """Name each group after the module of its first producer, with a number where groups share it."""
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
    """Find the values in which each group can be observed: outputs of layers, and what follows directly."""
    found: list[list[Site]] = [[] for _ in range(count)]
    for produced in walk.produced:
        start, place = produced.node, produced.axis
        if isinstance(outputs := walk.values[start], list):
            output = _observed_output(walk, start)
            if output is None or (axis := _axis_of(walk, output, outputs[0][place])) is None:
                continue
            start, place = output, axis
        producer = walk.names[produced.origin]
        for node, stage in _stages(start):
            axes = walk.values[node]
            if not isinstance(axes, tuple) or place >= len(axes):
                continue
            labels = axes[place]
            roots = np.where(labels > 0, walk.store.find(labels), 0)
            groups = group_of[roots]
            for g in np.unique(groups[groups >= 0]).tolist():
                position = np.flatnonzero(groups == g)
                found[g].append(Site(node.name, place, stage, producer, position, unit_of[roots[position]]))
    return found


def _observed_output(walk: Walk, layer: fx.Node) -> fx.Node | None:
    """Return the first output of a layer with several that is read; None if there is none.

    A layer that reads packed sequences has rows of all samples, those of each step together. They are
    observed where they have been put back in order.
    """
    outputs = [user for user in layer.users if operator_name(user) == "operator.getitem"]
    outputs.sort(key=lambda user: (not user.users, user.args[1]))
    if not outputs:
        return None
    node = outputs[0]
    while operator_name(layer).endswith(".data"):  # the overload for packed sequences
        behind = next((user for user in node.users if operator_name(user) in _UNPACKING), None)
        if behind is None:
            break
        node = behind
    return node


def _axis_of(walk: Walk, node: fx.Node, labels: NDArray[np.int64]) -> int | None:
    """Return the axis of a value that shares units with an axis of these labels; None if there is none."""
    axes, wanted = walk.values[node], np.unique(walk.store.find(labels[labels > 0]))
    found = enumerate(axes if isinstance(axes, tuple) else ())
    return next((k for k, own in found if np.isin(walk.store.find(own[own > 0]), wanted).any()), None)


def _stages(start: fx.Node) -> list[tuple[fx.Node, Stage]]:
    """Return the producing node, then the normalisation and the activation directly behind it."""
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
    """Return the frozen parts of tensors. Those without a reason, such as kernel axes, are left out."""
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
    """Return the number of the unit at each position along an axis, -1 for none."""
    return assembled.slot_of[np.maximum(labels, 0)]


def cost_model(assembled: Assembled, walk: Walk, tensors: list[Tensor], batch: int) -> CostModel:
    """Build the function from kept units to parameters and MACs."""
    model = CostModel(sum(g.size for g in assembled.groups), batch)
    for tensor in tensors:
        if tensor.is_parameter:
            model.add("params", 1, [model.axis(slots_of(assembled, a)) for a in tensor.axes], tensor.name)
    for contraction in walk.contractions:
        axes = [model.axis(slots_of(assembled, a)) for a in contraction.axes]
        model.add("macs", contraction.factor, axes, contraction.node)
    return model
