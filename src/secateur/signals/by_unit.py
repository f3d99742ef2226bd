"""How units lie in weights and activations, and sums over what belongs to each unit."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from secateur.graph.graph import Graph
from secateur.graph.groups import Group, Site, Slice
from secateur.graph.nodes import hint, shape_of
from secateur.graph.programs import batch_axes, inputs_of
from secateur.signals.program import NotObservedError


def sum_by_unit(tensor: Tensor, piece: Slice, size: int) -> NDArray[np.float64]:
    """Sum a tensor over everything that belongs to each unit, in float64.

    Args:
        tensor: Shaped like the tensor that `piece` lies in.
        piece: Which positions of which axis belong to which unit.
        size: Number of units.

    Returns:
        [size]; 0 for a unit that the slice does not touch.

    Example:
        >>> piece = Slice("w", 0, "produce", np.array([0, 1, 2, 3]), np.array([0, 1, 0, 1]))
        >>> sum_by_unit(torch.tensor([[1.0, 2.0], [0.0, 1.0], [5.0, 5.0], [1.0, 1.0]]), piece, 2)
        array([13.,  3.])
    """
    others = [axis for axis in range(tensor.ndim) if axis != piece.axis]
    # sum(dim=[]) would sum everything, and a bias has no other axis.
    totals = tensor.sum(dim=others, dtype=torch.float64) if others else tensor.double()
    weights = totals.detach().cpu().numpy()[piece.position]
    return np.bincount(piece.unit, weights=weights, minlength=size).astype(np.float64)


def producers(graph: Graph) -> dict[str, list[tuple[Group, Slice]]]:
    """Map each tensor that produces units to the groups it produces units of.

    In this order what is computed of a tensor is needed once, and can be dropped.
    """
    found: dict[str, list[tuple[Group, Slice]]] = {}
    for group in graph.groups:
        for piece in group.of_role("produce"):
            found.setdefault(piece.tensor, []).append((group, piece))
    return found


def covered(piece: Slice, size: int) -> NDArray[np.bool_]:
    """Mark the units that a slice has positions of. bool [size]"""
    mask = np.zeros(size, dtype=np.bool_)
    mask[piece.unit] = True
    return mask


def max_by_unit(entries: NDArray[np.float64], unit: NDArray[np.int64], into: NDArray[np.float64]) -> None:
    """Raise ``into[unit[i]]`` to at least ``entries[i]``, in place.

    Example:
        >>> best = np.full(2, -np.inf)
        >>> max_by_unit(np.array([1.0, 4.0, 3.0]), np.array([0, 1, 0]), best)
        >>> best
        array([3., 4.])
    """
    np.maximum.at(into, unit, entries)


def by_entry(value: Tensor, site: Site, batch: int, dynamic: tuple[int, ...], group: Group) -> Tensor:
    """Reshape an activation to samples, entries of the group, and all other axes (the map).

    Args:
        value: What the site's node computed.
        site: Where the units lie in it.
        batch: Number of samples.
        dynamic: The axes whose length depends on the number of samples, as far as the captured program says.
        group: For messages.

    Returns:
        [batch, entries, *map]; a view where strides allow.

    Raises:
        NotObservedError: No axis holds the samples.
    """
    axis = _sample_axis(tuple(value.shape), site, batch, dynamic)
    if axis is None:
        raise NotObservedError(
            f"group {group.name}: expected an axis of {batch} samples at {site.node}, got shape "
            f"{list(value.shape)}. Exclude the group, or use a signal that reads no activations."
        )
    value = value.movedim((axis, site.axis), (0, 1))
    if value.shape[0] != batch:
        # [batch * k, units, ...] -> [batch, units, k, ...]
        value = value.unflatten(0, (batch, -1)).movedim(1, 2)
    if len(site.position) == value.shape[1] and bool((site.position == np.arange(value.shape[1])).all()):
        return value
    return value[:, torch.as_tensor(site.position, device=value.device)]


def _sample_axis(shape: tuple[int, ...], site: Site, batch: int, dynamic: tuple[int, ...]) -> int | None:
    """Find the axis of the samples: the axis that depends on their number, if there is exactly one.

    Otherwise, and for programs captured at a fixed batch size, axis 0 if it is as long as the batch, then the
    first other axis that is, then axis 0 if its length is a multiple of the batch, as when windows or
    positions were folded into it (batch-major).
    """
    open_axes = [a for a in dynamic if a != site.axis and shape[a] % batch == 0]
    exact = [a for a in range(len(shape)) if a != site.axis and shape[a] == batch]
    if len(open_axes) == 1:
        return open_axes[0]
    if exact:
        return exact[0]
    return 0 if site.axis != 0 and shape[0] % batch == 0 else None


def traced_map(graph: Graph, site: Site) -> tuple[int, ...]:
    """The shape of a site's map in the traced program."""
    node = next(n for n in graph.program.graph.nodes if n.name == site.node)
    first = next(n.meta["val"] for n in inputs_of(graph.program))
    shape, batch = shape_of(node), hint(first.shape[0])
    axis = _sample_axis(shape, site, batch, batch_axes(graph.program, node))
    if axis is None:
        return ()
    rest = tuple(n for k, n in enumerate(shape) if k not in (axis, site.axis))
    return rest if shape[axis] == batch else (shape[axis] // batch, *rest)
