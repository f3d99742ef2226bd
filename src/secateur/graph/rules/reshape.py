"""Rules for views: axes that merge, split, appear, vanish or change places."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from secateur.graph.labels import Labels
from secateur.graph.rules.op import Axes, Op, Split, plain, product
from secateur.graph.rules.registry import rule


@rule("aten.view.default", "aten.reshape.default", "aten._unsafe_view.default", "aten._reshape_alias.default")
@rule("aten.flatten.using_ints", "aten.unflatten.int", "aten.view_as.default", "aten.reshape_as.default")
@rule("aten.squeeze.default", "aten.squeeze.dim", "aten.squeeze.dims", "aten.unsqueeze.default")
@rule("aten.squeeze_.dim", "aten.unsqueeze_.default", "aten.ravel.default")
def reshape(op: Op) -> Axes:
    """View the same numbers with other axes.

    The axes before and after are matched in the shortest runs that hold equally many positions. In
    [2, 3, 4] -> [6, 2, 2], for example, the axes of sizes 2 and 3 become one of size 6, and the axis of size
    4 becomes two of size 2. An axis that stays as it is keeps its labels. `_merge` is for axes that become
    one, `_split` for an axis that becomes several.
    """
    x = op.axes(op.tensors()[0])
    shape = op.output_shape
    out: list[Labels] = [plain(n) for n in shape]
    for inputs, outputs in _runs([len(a) for a in x], shape):
        merged = _merge(op, [x[i] for i in inputs])
        split = _split(op, merged, [shape[k] for k in outputs], outputs[0])
        for k, labels in zip(outputs, split, strict=True):
            out[k] = labels
    return tuple(out)


def _runs(before: Sequence[int], after: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """Match axes before and after in the shortest runs with equal products. Axes of size 1 are left out."""
    left = [i for i, n in enumerate(before) if n != 1]
    right = [k for k, n in enumerate(after) if n != 1]
    if 0 in before or 0 in after:
        return
    while left and right:
        inputs, outputs = [left.pop(0)], [right.pop(0)]
        while (a := product(before[i] for i in inputs)) != (b := product(after[k] for k in outputs)):
            if a < b:
                inputs.append(left.pop(0))
            else:
                outputs.append(right.pop(0))
        yield inputs, outputs


def _merge(op: Op, axes: list[Labels]) -> Labels:
    """Return the labels of the one axis that several axes become.

    Each position of the new axis stands for one position of each old axis, but it can have only one label.
    So one of the old axes goes on to carry units, and the others are frozen. An axis that belongs to a
    parameter takes precedence over one that only follows others, such as the copies that an expand makes;
    then one that is not frozen so far.
    """
    if len(axes) == 1:
        return axes[0]
    of_parameter = [op.store.is_of_parameter(axis) for axis in axes]
    live = [op.store.may_be_removed(axis) for axis in axes]
    if op.walk.choices is None and sum(of_parameter) > 1:
        # In the first walk the axes of splits still have trial labels. Freezing one of them here would decide
        # the split by accident. So the merged axis gets new labels, and the second walk decides.
        op.walk.unmerged = True
        return op.store.fresh(product(len(a) for a in axes))
    # Of several axes that belong to parameters, the outermost carries the units: heads, not head size.
    ranks = [(of_parameter[i], live[i], bool(axes[i].any()), -i) for i in range(len(axes))]
    carrying = max(range(len(axes)), key=ranks.__getitem__)
    for i, axis in enumerate(axes):
        if i != carrying and of_parameter[i]:
            op.freeze(axis, "merged into one axis with another that holds units")
        elif i != carrying:
            op.store.freeze(axis, 0)
    outer = product(len(a) for a in axes[:carrying])
    inner = product(len(a) for a in axes[carrying + 1 :])
    return np.tile(np.repeat(axes[carrying], inner), outer)


def _split(op: Op, labels: Labels, sizes: list[int], first: int) -> list[Labels]:
    """Return the labels of the axes that one axis becomes.

    If the labels vary along only one of the new axes, that axis carries them. Otherwise one axis is chosen
    (see `secateur.graph.splits`), and the old positions that share an index along it are tied: they become
    one unit.

    Args:
        op: The call.
        labels: The labels of the old axis.
        sizes: The sizes of the new axes.
        first: The number of the first new axis, since one call may split several axes.
    """
    if len(sizes) == 1:
        return [labels]
    out = [plain(n) for n in sizes]
    if not labels.any():
        return out
    axis, key = op.vary_along(labels, sizes), (op.node.name, first)
    if axis is None:
        if op.walk.choices is None:
            # The first walk gives each axis labels of its own, to see what operators behind do with each.
            trial = tuple(_alike(op, labels, sizes, k) for k in range(len(sizes)))
            op.walk.splits.append(Split(key, tuple(sizes), trial))
            return list(trial)
        axis = op.walk.choices.get(key, max(range(len(sizes)), key=lambda k: (sizes[k], k)))
    out[axis] = op.carry(labels, sizes, axis)
    if key in op.walk.sized:
        op.walk.dimensions.append(out[axis])
    return out


def _alike(op: Op, labels: Labels, sizes: list[int], axis: int) -> Labels:
    """Return new labels for one axis of the shape `sizes`, equal where it holds equal parts of flat `labels`.

    In `nn.MultiheadAttention`, samples and heads become one axis. A head has one label in all samples, so the
    split of that axis which follows finds the heads, whatever the number of samples.
    """
    lines = np.moveaxis(op.store.find(labels).reshape(sizes), axis, 0).reshape(sizes[axis], -1)
    parts, which = np.unique(lines, axis=0, return_inverse=True)
    return op.store.fresh(len(parts), of_parameter=True)[which.ravel()]


@rule("aten.permute.default", "aten.movedim.int", "aten.movedim.intlist", "aten.transpose.int")
@rule(
    "aten.transpose_.default",
    "aten.swapaxes.default",
    "aten.swapdims.default",
    "aten.t.default",
    "aten.t_.default",
)
@rule("aten.numpy_T.default", "aten.mT.default", "aten.adjoint.default")
def reorder(op: Op) -> Axes:
    """Let axes change places. A small tensor whose axes all differ in size shows which axis goes where."""
    x = op.axes(op.tensors()[0])
    probe = torch.empty(tuple(range(2, len(x) + 2)), device="meta")
    moved = op.node.target(probe, *op.node.args[1:], **op.node.kwargs)  # type: ignore[operator]
    return tuple(x[n - 2] for n in moved.shape)


@rule("aten.expand.default", "aten.expand_as.default", "aten.broadcast_to.default")
def expand(op: Op) -> Axes:
    """Copy along axes of size 1. The copies get free labels, which follow whatever they are combined with."""
    x = op.axes(op.tensors()[0])
    shape = op.output_shape
    new = len(shape) - len(x)
    return tuple(
        x[k - new] if k >= new and len(x[k - new]) == n else op.store.fresh(n) for k, n in enumerate(shape)
    )


@rule("aten.repeat.default", "aten.tile.default")
def repeat(op: Op) -> Axes:
    """Repeat a whole tensor. All copies of a position have its label, so they are the same unit."""
    x = op.axes(op.tensors()[0])
    shape = op.output_shape
    new = len(shape) - len(x)
    out: list[Labels] = []
    for k, n in enumerate(shape):
        axis = x[k - new] if k >= new else plain(1)
        out.append(op.store.fresh(n) if len(axis) == 1 and n > 1 else np.tile(axis, n // max(len(axis), 1)))
    return tuple(out)


@rule("aten.repeat_interleave.self_int")
def repeat_interleave(op: Op) -> Axes:
    """Repeat each position in its place: ``a a b b``. The copies are the same unit."""
    x = list(op.axes(op["self"]))
    dim = op.integer("dim") % len(x)
    x[dim] = np.repeat(x[dim], op.integer("repeats"))
    return tuple(x)


@rule("aten.pixel_shuffle.default", "aten.pixel_unshuffle.default", "aten.channel_shuffle.default")
def shuffle(op: Op) -> Axes:
    """Move positions between channels and space, or among channels. Blocks of channels become one unit."""
    x = list(op.axes(op["self"]))
    channel = 1 if "channel" in op.name else len(x) - 3
    labels = x[channel]
    if op.name.startswith("aten.pixel_shuffle"):
        square = op.integer("upscale_factor") ** 2
        x[channel] = op.carry(labels, (len(labels) // square, square), 0)
    elif op.name.startswith("aten.pixel_unshuffle"):
        x[channel] = np.repeat(labels, op.integer("downscale_factor") ** 2)
    else:
        groups = op.integer("groups")
        inner = op.carry(labels, (groups, len(labels) // groups), 1)
        x[channel] = np.repeat(inner, groups)
    if "channel" in op.name:
        return tuple(x)
    for axis in x[-2:]:
        op.freeze(axis, "holds positions of channels")
    return (*x[:-2], *(plain(n) for n in op.output_shape[-2:]))


@rule("aten.im2col.default", "aten.col2im.default")
def patches(op: Op) -> Axes:
    """Cut an image into windows (`nn.Unfold`), or add windows up to an image (`nn.Fold`).

    In the tensor of windows, one axis holds (channel, position in the window), with the window innermost.
    """
    x = list(op.axes(op["self"]))
    shape = op.output_shape
    window = product(op.integers(op["kernel_size"]))
    channel = len(x) - (3 if op.name.startswith("aten.im2col") else 2)
    for axis in x[channel + 1 :]:
        op.freeze(axis, "windows are taken from it")
    if op.name.startswith("aten.im2col"):
        return (*x[:channel], np.repeat(x[channel], window), plain(shape[-1]))
    carried = op.carry(x[channel], (len(x[channel]) // window, window), 0)
    return (*x[:channel], carried, *(plain(n) for n in shape[channel + 1 :]))


@rule("aten.unfold.default")
def windows(op: Op) -> Axes:
    """Cut windows along one axis (`Tensor.unfold`). A new last axis holds the positions in a window."""
    x, shape = op.axes(op["self"]), op.output_shape
    dim = op.integer("dimension") % max(len(x), 1)
    op.freeze(x[dim], "windows are taken from it")
    return (*x[:dim], plain(shape[dim]), *x[dim + 1 :], plain(shape[-1]))
