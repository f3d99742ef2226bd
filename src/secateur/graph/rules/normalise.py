"""Normalisation layers."""

from __future__ import annotations

from secateur.graph.rules.op import Axes, Op
from secateur.graph.rules.registry import rule


@rule("aten.batch_norm.default", "aten.instance_norm.default")
@rule("aten._native_batch_norm_legit_no_training.default", "aten.native_batch_norm.default")
def per_channel(op: Op) -> Axes | list[Axes | None]:
    """Statistics and affine parameters per channel (axis 1): exact."""
    x = op.axes(op["input"])
    for name in ("weight", "bias", "running_mean", "running_var"):
        parameter = op.get(name)
        if parameter is not None:
            op.tie(op.axes(parameter)[0], x[1])
    return [x, None, None] if "native" in op.name else x


@rule("aten.layer_norm.default", "aten.rms_norm.default")
def over_last_axes(op: Op) -> Axes:
    """Mean and variance over the last axes mix their positions."""
    x = op.axes(op["input"])
    last = len(op["normalized_shape"])
    for name in ("weight", "bias"):
        parameter = op.get(name)
        if parameter is not None:
            op.broadcast(x[-last:], op.axes(parameter))
    for axis in x[-last:]:
        op.mix(axis)
    return x


@rule("aten.group_norm.default")
def group_norm(op: Op) -> Axes:
    """Channels are normalised within groups.

    Whole groups can go, and leave the others as they were. Where the labels already run across the
    groups, every group loses the same positions instead, which mixes them.
    """
    x = op.axes(op["input"])
    channels = x[1]
    groups = op.integer("num_groups")
    for name in ("weight", "bias"):
        parameter = op.get(name)
        if parameter is not None:
            op.tie(op.axes(parameter)[0], channels)
    grid = (groups, len(channels) // groups)
    followed = op.vary_along(channels, grid)
    if groups == 1 or (followed == 1 and grid[1] > 1):
        op.carry(channels, grid, 1)
        op.mix(channels)
    else:
        op.carry(channels, grid, 0)
    return x


@rule("aten.softmax.int", "aten.log_softmax.int", "aten._softmax.default", "aten._log_softmax.default")
@rule("aten.logsumexp.default", "aten.linalg_vector_norm.default")
def over_one_axis(op: Op) -> Axes:
    """A sum over an axis mixes its positions."""
    x = op.axes(op["self"])
    dims = op["dim"] if isinstance(op["dim"], list | tuple) else [op["dim"]]
    dims = [d % len(x) for d in dims] if dims and dims[0] is not None else list(range(len(x)))
    for dim in dims:
        op.mix(x[dim])
    if "softmax" in op.name:
        return x
    return reduced(x, dims, keepdim=bool(op.get("keepdim", False)))


def reduced(x: Axes, dims: list[int], *, keepdim: bool) -> Axes:
    """The axes that are left after a reduction over `dims`."""
    if keepdim:
        return tuple(a[:1] * 0 if k in dims else a for k, a in enumerate(x))
    return tuple(a for k, a in enumerate(x) if k not in dims)
