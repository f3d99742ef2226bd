"""Which tensors of a group are weights, and the numbers they hold of each unit."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from secateur.errors import ScoreError
from secateur.graph.graph import Graph
from secateur.graph.groups import Group, Role, Slice
from secateur.graph.nodes import arguments_by_name
from secateur.graph.rules.naming import NORMS, operator_name
from secateur.signals.signal import Context

_PRODUCTS = frozenset({"aten.mul.Tensor", "aten.mul_.Tensor", "aten.multiply.Tensor"})


def multipliers(graph: Graph) -> frozenset[str]:
    """Names of the tensors that units are multiplied by: weights of normalisations, layer scales.

    What else has the role ``scale`` shifts a unit (a batch norm's bias) or describes its data (statistics).
    """
    found: set[str] = set()
    for node in graph.program.graph.nodes:
        if operator_name(node) in NORMS:
            factors = [arguments_by_name(node)["weight"]]
        elif operator_name(node) in _PRODUCTS:
            factors = [n for n in node.all_input_nodes if graph.is_weight(n)]
        else:
            continue
        found.update(name for factor in factors if factor is not None and (name := graph.origin(factor)))
    return frozenset(found)


def weight_slices(
    signal: str, context: Context, group: Group, roles: Sequence[Role], scales: Collection[str] = ()
) -> list[Slice]:
    """The slices of a group's weights: of parameters, without what merely shifts a unit.

    Args:
        signal: For messages.
        context: Of the run.
        group: Whose units.
        roles: Which roles count.
        scales: What counts of the role ``scale``; see `multipliers`.

    Returns:
        At least one slice. Where a group has nothing but biases, these stand in.

    Raises:
        ScoreError: The group has no parameter in these roles.
    """
    pieces = [
        piece
        for piece in group.slices
        if piece.role in roles
        and piece.tensor in context.parameters
        and context.tensors[piece.tensor].is_floating_point()
        and (piece.role != "scale" or piece.tensor in scales)
    ]
    weights = [p for p in pieces if p.role == "scale" or context.tensors[p.tensor].ndim > 1] or pieces
    if not weights:
        raise ScoreError(
            f"{signal}, group {group.name}: expected parameters with roles {', '.join(roles)}, got none. "
            "Name other roles, or choose another signal."
        )
    return weights


def unit_rows(tensor: Tensor, piece: Slice, size: int) -> tuple[Tensor, NDArray[np.int64]]:
    """Return all numbers that a tensor holds of each unit, one row for each unit.

    Args:
        tensor: Shaped like the tensor that `piece` lies in.
        piece: Which positions of which axis belong to which unit.
        size: Number of units.

    Returns:
        The rows, float64 [units, numbers], a unit's positions one after the other and zeros where another
        unit has more of them; and the units that the slice touches, ascending. [units]

    Example:
        >>> piece = Slice("w", 0, "produce", np.array([0, 1, 2, 3]), np.array([0, 1, 0, 1]))
        >>> unit_rows(torch.tensor([[1.0], [2.0], [3.0], [4.0]]), piece, 2)[0].tolist()
        [[1.0, 3.0], [2.0, 4.0]]
    """
    order = np.argsort(piece.unit, kind="stable")
    units, start, count = np.unique(piece.unit[order], return_index=True, return_counts=True)
    position = torch.as_tensor(piece.position[order], device=tensor.device)
    filters = tensor.detach().double().movedim(piece.axis, 0)[position].reshape(len(order), -1)
    row = np.repeat(np.arange(len(units)), count)
    place = np.arange(len(order)) - start[row]
    rows = filters.new_zeros(len(units), int(count.max()), filters.shape[1])
    rows[torch.as_tensor(row, device=rows.device), torch.as_tensor(place, device=rows.device)] = filters
    return rows.flatten(1), units


def relative(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Divide scores by their mean, so that tensors of different scale count alike; zeros if all are zero.

    Example:
        >>> relative(np.array([1.0, 3.0]))
        array([0.5, 1.5])
    """
    mean = scores.mean()
    return scores / mean if mean > 0 else np.zeros_like(scores)
