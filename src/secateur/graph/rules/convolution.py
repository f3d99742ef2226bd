"""Rules for convolutions: 1-d to 3-d, transposed, grouped and depthwise."""

from __future__ import annotations

import numpy as np

from secateur.graph.labels import Labels
from secateur.graph.rules.op import PRODUCE, Axes, Op, plain, product
from secateur.graph.rules.registry import rule


@rule("aten.conv1d.default", "aten.conv2d.default", "aten.conv3d.default")
@rule("aten.conv1d.padding", "aten.conv2d.padding", "aten.conv3d.padding")
def convolution(op: Op) -> Axes:
    """Convolve with a weight [out, in / groups, *kernel]."""
    return _convolve(op, transposed=False)


@rule("aten.conv_transpose1d.default", "aten.conv_transpose2d.input", "aten.conv_transpose3d.input")
def transposed_convolution(op: Op) -> Axes:
    """Convolve, transposed, with a weight [in, out / groups, *kernel]."""
    return _convolve(op, transposed=True)


@rule("aten.convolution.default")
def general_convolution(op: Op) -> Axes:
    """Convolve, transposed or not: the operator that PyTorch breaks all others down to."""
    return _convolve(op, transposed=bool(op["transposed"]))


def _convolve(op: Op, *, transposed: bool) -> Axes:
    """Tie the channels of input, weight, bias and output; freeze the axes that a kernel moves along."""
    x, weight, bias = op["input"], op["weight"], op.get("bias")
    groups = op.integer("groups")
    x_axes, weight_axes = op.axes(x), op.axes(weight)
    channel = len(x_axes) - (len(weight_axes) - 1)  # 1, or 0 where the batch axis is missing
    if groups == 1:
        out, into = weight_axes[:2] if not transposed else (weight_axes[1], weight_axes[0])
        op.tie(x_axes[channel], into)
        op.role(out, PRODUCE)
        op.consumes(weight, into)
    else:
        out = _grouped(op, x_axes[channel], weight_axes[0], weight_axes[1], groups, transposed=transposed)
    if bias is not None:
        op.tie(op.axes(bias)[0], out)
        op.role(op.axes(bias)[0], PRODUCE)
    for kernel_axis in weight_axes[2:]:
        op.store.freeze(kernel_axis, 0)
    op.produces(weight, channel)
    space = _space(op, x_axes[channel + 1 :], transposed=transposed)
    # Each weight is multiplied once for each position of the output; if transposed, of the input.
    met = x_axes[channel + 1 :] if transposed else space
    op.count(product(op.shape(weight)[2:]), *x_axes[:channel], *met, *weight_axes[:2])
    return (*x_axes[:channel], out, *space)


def _space(op: Op, axes: Axes, *, transposed: bool) -> Axes:
    """Return the output's axes of space or time. A kernel of size 1 leaves an axis as it is."""
    shape, kernel = op.output_shape[-len(axes) :], op.shape(op["weight"])[2:]
    names = ("stride", "padding", "output_padding")
    given = {n: v for n in names if isinstance(v := op.get(n, 0), list | tuple | int)}  # or "same", "valid"
    out = []
    for k, (axis, size) in enumerate(zip(axes, shape, strict=True)):
        stride, *padding = (
            op.integers([v if isinstance(v, int) else v[k % len(v)]])[0] for v in given.values()
        )
        if kernel[k] == 1 and stride == 1 and not any(padding):
            out.append(axis)
            continue
        op.freeze(axis, "a kernel moves along it")
        out.append(plain(size))
    return tuple(out)


def _grouped(op: Op, x: Labels, first: Labels, second: Labels, groups: int, *, transposed: bool) -> Labels:
    """Return the labels of the output channels of a grouped convolution.

    All groups have to stay equally large. There are two ways to remove channels then. Either a unit is a
    whole group, with all its inputs and outputs; a depthwise convolution is the case of one input in each
    group. Or a unit is the same position in every group. If the labels of the input already vary in one of
    the two ways, that one is taken; otherwise the one that gives more units.

    Args:
        op: The call.
        x: The labels of the input channels.
        first: The labels of axis 0 of the weight.
        second: The labels of axis 1 of the weight.
        groups: How many groups there are.
        transposed: Whether axis 0 of the weight is the input.
    """
    per_group = len(x) // groups
    grid = (groups, per_group)
    followed = op.vary_along(x, grid)
    whole = groups >= per_group if followed is None else followed == 0
    split = first if not transposed else x  # groups lie one after the other along it
    if transposed:
        op.tie(x, first)
    across = len(split) // groups
    if whole:  # a unit is a whole group
        carried = op.carry(x, grid, 0)
        op.tie(carried, op.carry(split, (groups, across), 0))
        op.freeze(second, "position inside a group that is removed whole")
        op.role(first, PRODUCE)
        return first if not transposed else np.repeat(carried, len(second))
    inner = op.carry(x, grid, 1)  # a unit is the same position in every group
    if transposed:
        op.consumes(op["weight"], first)
        op.role(second, PRODUCE)
        return np.tile(second, groups)
    op.tie(inner, second)
    op.consumes(op["weight"], second)
    op.role(first, PRODUCE)
    op.carry(first, (groups, across), 1)
    return first
