"""Two plans that were applied one after the other, as one plan for the dense model."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from secateur.errors import PlanError
from secateur.graph.groups import Group
from secateur.graph.kept import Removed
from secateur.group_decision import GroupDecision, SliceDecision
from secateur.plan import Plan
from secateur.targets.units.record import Record
from secateur.targets.units.tensors import removed_positions


def compose(first: Record, then: Record) -> Record:
    """Make one record for a model that was pruned twice.

    Args:
        first: The record of the first pruning, of the dense model.
        then: The record of the second pruning, of its result.

    Returns:
        A record whose plan is for the dense model. Its allocator, settings and budget are those of `then`. It
        has no certificates, since each of them is about one pruning only.
    """
    captured = {*first.captured, *then.captured}
    outermost = (p for p in captured if not any(p.startswith(f"{other}.") for other in captured))
    return Record(
        compose_plans(first.plan, then.plan),
        then.form,
        then.note or first.note,
        (*first.repairs, *then.repairs),
        sizes={**first.sizes, **then.sizes},
        captured=tuple(sorted(outermost)),
        flags=tuple(dict.fromkeys((*first.flags, *then.flags))),
    )


def compose_plans(earlier: Plan, later: Plan) -> Plan:
    """Make one plan for the dense model that removes what two plans in a row remove.

    Raises:
        PlanError: The later plan removes units that the dense model does not have.
    """
    removed = removed_positions(earlier)
    more = {group.name: group for group in later.groups}
    changed = split(later.groups, earlier)
    if odd := [name for name in changed if more[name].removed]:
        raise PlanError(
            f"compose: expected a second plan for the units that the first one left, got group "
            f"{odd[0]!r}, whose units are others. Leave this group whole in the second plan."
        )
    groups = tuple(
        _both(group, more[group.name], removed) if group.name in more and group.name not in changed else group
        for group in earlier.groups
    )
    composed = Plan.model_validate(
        {
            **dict(later),
            "fingerprint": earlier.fingerprint,
            "inputs": earlier.inputs,
            "folded": earlier.folded,
            "dense": earlier.dense,
            "groups": groups,
            "certificates": {},
        }
    )
    return composed.of_graph() if earlier.slices_known and later.slices_known else composed


def split(groups: Iterable[Group | GroupDecision], earlier: Plan) -> tuple[str, ...]:
    """Return the names of groups of a pruned model whose units are not units of the dense model.

    An example is a grouped convolution of which one block is left. Then its channels can be removed one by
    one. In the dense model they cannot, so no plan for the dense model can say that.
    """
    before = {group.name: group for group in earlier.groups}
    return tuple(g.name for g in groups if g.name not in before or not _same(before[g.name], g))


def _same(group: GroupDecision, more: Group | GroupDecision) -> bool:
    """Whether `more`, of a pruned model, has exactly the units that are left of `group`."""
    return group.kept == more.size and _axes(group) == _axes(more)


def _axes(group: Group | GroupDecision) -> list[tuple[str, int, str]]:
    return [(piece.tensor, piece.axis, piece.role) for piece in group.slices]


def _both(group: GroupDecision, more: GroupDecision, removed: Removed) -> GroupDecision:
    """Return the decision on a group of the dense model that removes what both decisions remove."""
    units = _before(np.array(more.removed, np.int64), np.array(group.removed, np.int64))
    slices = tuple(
        _with(old, {*old.removed, *_dense(new, removed)})
        for old, new in zip(group.slices, more.slices, strict=True)
    )
    together = tuple(sorted({*group.removed, *map(int, units)}))
    return group.model_copy(
        update={"removed": together, "slices": slices, "exact": group.exact and more.exact}
    )


def _with(piece: SliceDecision, removed: set[int]) -> SliceDecision:
    return piece.model_copy(update={"removed": tuple(sorted(removed))})


def _dense(piece: SliceDecision, removed: Removed) -> set[int]:
    """Return the positions that a slice of the pruned model loses, as positions in the dense model."""
    earlier = removed.get(piece.tensor, {}).get(piece.axis, np.zeros(0, np.int64))
    return {int(p) for p in _before(np.array(piece.removed, np.int64), earlier)}


def _before(positions: NDArray[np.int64], removed: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return where positions were before the positions `removed` (ascending) were removed."""
    shift = np.searchsorted(removed - np.arange(len(removed)), positions, side="right")
    return np.asarray(positions + shift, np.int64)
