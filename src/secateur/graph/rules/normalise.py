"""Rules for normalisation, softmax and running sums."""

from __future__ import annotations

from secateur.graph.rules.op import Axes, Op
from secateur.graph.rules.registry import rule


@rule("aten.batch_norm.default", "aten.instance_norm.default")
@rule("aten._native_batch_norm_legit_no_training.default", "aten.native_batch_norm.default")
def per_channel(op: Op) -> Axes | list[Axes | None]:
    """Normalise each channel, which lies along axis 1. Removing a channel changes no other one.

    Statistics that are computed anew mix the axes that they run over: the batch and space in batch norm,
    space in instance norm.
    """
    x = op.axes(op["input"])
    for name in ("weight", "bias", "running_mean", "running_var"):
        parameter = op.get(name)
        if parameter is not None:
            op.tie(op.axes(parameter)[0], x[1])
    if op.get("training", False) or op.get("use_input_stats", False):
        for axis in x[2:] if "instance" in op.name else (x[0], *x[2:]):
            op.mix(axis)
    return [x, None, None] if "native" in op.name else x


@rule("aten.layer_norm.default", "aten.rms_norm.default")
def over_last_axes(op: Op) -> Axes:
    """Normalise by a mean and variance over the last axes, whose positions are mixed."""
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
    """Normalise the channels within each of several groups.

    A unit is a whole group, whose removal changes no other one. But where the labels already vary within
    groups, a unit is the same position in every group, and the channels are mixed.
    """
    x = op.axes(op["input"])
    channels = x[1]
    for axis in x[2:]:
        op.mix(axis)
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
@rule("aten.special_softmax.default", "aten.special_log_softmax.default")
@rule(
    "aten.cumsum.default", "aten.cumprod.default", "aten.logcumsumexp.default", "aten.cummax.default",
    "aten.cummin.default",
)  # fmt: skip
def over_one_axis(op: Op) -> Axes | list[Axes]:
    """Compute softmax or a running sum along an axis, whose positions are mixed."""
    x = op.axes(op["self"])
    op.mix(x[op.integer("dim") % len(x)])
    return op.for_each_output(x)


@rule("aten.renorm.default", "aten.renorm_.default")
def renorm(op: Op) -> Axes:
    """Scale each slice along an axis down to a largest norm. The norm mixes all other axes."""
    x = op.axes(op["self"])
    for k, axis in enumerate(x):
        if k != op.integer("dim") % len(x):
            op.mix(axis)
    return x


@rule("aten._weight_norm.default")
def weight_norm(op: Op) -> Axes:
    """Divide a weight by its norm over all axes but one, then multiply by a length along that one."""
    v, length, kept = op.axes(op["v"]), op.axes(op["g"]), op.integer("dim")
    for k, axis in enumerate(v):
        if k != kept % len(v) or kept == -1:  # with -1 the norm runs over all axes
            op.mix(axis)
    return op.broadcast(v, length)


def reduced(x: Axes, dims: list[int], *, keepdim: bool) -> Axes:
    """Return the labels that are left after a reduction over the axes `dims`."""
    if keepdim:
        return tuple(a[:1] * 0 if k in dims else a for k, a in enumerate(x))
    return tuple(a for k, a in enumerate(x) if k not in dims)
