"""What a plan removes from tensors: which positions of which axes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from secateur.common.mapped import stored_like
from secateur.errors import ApplyError, PlanError
from secateur.graph.nodes import UNNAMED
from secateur.plan import Plan

Removed = Mapping[int, NDArray[np.int64]]
"""Axis -> the positions that are removed, ascending."""


def removed_positions(plan: Plan, *, consumed_only: bool = False) -> dict[str, dict[int, NDArray[np.int64]]]:
    """Return name of a tensor -> axis -> removed positions.

    Args:
        plan: The decision.
        consumed_only: Whether to return only positions where zeros do the same as a removal: in weights that
            read units; and, for units that a product of activations reads, such as queries and keys, in the
            weights that produce them.
    """
    found: dict[str, dict[int, set[int]]] = {}
    for group in plan.groups:
        for piece in group.slices:
            if piece.role == "block":  # a whole module, and no tensor
                continue
            if piece.removed and (piece.role in ("consume", "match") or not consumed_only):
                found.setdefault(piece.tensor, {}).setdefault(piece.axis, set()).update(piece.removed)
    return {
        tensor: {axis: np.array(sorted(positions), dtype=np.int64) for axis, positions in axes.items()}
        for tensor, axes in found.items()
    }


def check_positions(model: nn.Module, plan: Plan) -> None:
    """Make sure that all axes and positions of a plan exist: one from a file may name others.

    Raises:
        PlanError: An axis or a position does not exist.
    """
    for name, axes in removed_positions(plan).items():
        try:
            shape = tensor_called(model, name).shape
        except ApplyError:  # neither a parameter nor a buffer
            continue
        for axis, positions in axes.items():
            size = shape[axis] if axis < len(shape) else 0
            if positions[-1] >= size:
                raise PlanError(
                    f"plan: expected positions below {size} of axis {axis} of {name} {tuple(shape)}, got "
                    f"{positions[-1]}. Make the plan again."
                )


def kept(size: int, removed: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return a mask that is True for each position that stays. [size]"""
    mask = np.ones(size, dtype=bool)
    mask[removed] = False
    return mask


def cut(tensor: torch.Tensor, removed: Removed) -> torch.Tensor:
    """Copy a tensor without the removed positions. The copy is detached and contiguous."""
    out = tensor.detach()
    for axis, positions in removed.items():
        stays = np.flatnonzero(kept(out.shape[axis], positions))
        out = out.index_select(axis, torch.as_tensor(stays, device=out.device))
    return stored_like(out if removed else out.clone(memory_format=torch.contiguous_format), tensor)


def cut_like(tensor: torch.Tensor, removed: Removed) -> torch.Tensor:
    """Copy a tensor without the removed positions. A parameter stays a parameter."""
    smaller = cut(tensor, removed)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(smaller, requires_grad=tensor.requires_grad)
    return smaller


def submodule_called(model: nn.Module, path: str) -> nn.Module | None:
    """Return the submodule at a path; None if there is none."""
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def tensor_called(model: nn.Module, name: str) -> torch.Tensor:
    """Return the parameter, buffer or tensor attribute with this name.

    Raises:
        ApplyError: The model has none.
    """
    path, _, leaf = name.rpartition(".")
    found = getattr(submodule_called(model, path), leaf, None)
    if isinstance(found, torch.Tensor):
        return found
    if name.startswith(UNNAMED):
        raise ApplyError(
            "apply: expected all that shrinks to be a parameter or a buffer, got a tensor that is neither, "
            "which forward() makes or takes from a list, a dictionary or a global. As it is, only "
            "form='graph' can cut it. Register it with register_buffer."
        )
    raise ApplyError(
        f"apply: expected the model to hold a tensor {name!r}, got none. Pass the model that was traced."
    )


def groups_after(stays: NDArray[np.bool_], groups: int) -> int:
    """Return how many groups are left of an axis of `groups` equal blocks.

    Either whole blocks are removed, or all blocks lose the same positions. Then their number stays.
    """
    blocks = stays.reshape(groups, -1)
    whole = blocks.all(axis=1) | ~blocks.any(axis=1)
    return int(blocks.any(axis=1).sum()) if whole.all() else groups
