"""Rules for joining tensors along an axis, and for taking parts of an axis."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import fx

from secateur.graph.labels import Labels
from secateur.graph.nodes import hint
from secateur.graph.rules.op import Axes, Op, plain
from secateur.graph.rules.registry import rule


@rule("aten.cat.default", "aten.concat.default", "aten.concatenate.default")
def cat(op: Op) -> Axes:
    """Join tensors along an axis, and their labels with them. The other axes are tied to each other."""
    parts = [op.axes(n) for n in op["tensors"]]
    parts = [p for p in parts if not (len(p) == 1 and len(p[0]) == 0)]  # torch skips empty vectors
    rank = len(parts[0])
    dim = op.integers([op.get("dim", op.get("axis", 0))])[0] % rank
    rest = op.broadcast(*(tuple(a for k, a in enumerate(p) if k != dim) for p in parts))
    joined = np.concatenate([p[dim] for p in parts])
    return (*rest[:dim], joined, *rest[dim:])


@rule("aten.stack.default")
def stack(op: Op) -> Axes:
    """Join tensors along a new axis, which holds no units. The other axes are tied to each other."""
    parts = [op.axes(n) for n in op["tensors"]]
    dim = op.integer("dim") % (len(parts[0]) + 1)
    rest = op.broadcast(*parts)
    return (*rest[:dim], plain(len(parts)), *rest[dim:])


@rule("aten.split.Tensor", "aten.split.sizes", "aten.split_with_sizes.default", "aten.chunk.default")
@rule("aten.tensor_split.sections", "aten.tensor_split.indices", "aten.unsafe_chunk.default")
def split(op: Op) -> list[Axes]:
    """Cut an axis into consecutive parts, of the sizes that they had in the capture."""
    x = op.axes(op.tensors()[0])
    dim = op.integer("dim") % len(x)
    sizes = [op.shape(part)[dim] for part in op.node.meta["val"]]
    if op.is_computed:
        op.freeze(x[dim], "cut where a computed number says")
    cuts = np.split(x[dim], np.cumsum(sizes)[:-1])
    return [(*x[:dim], cut, *x[dim + 1 :]) for cut in cuts]


@rule("aten.unbind.int")
def unbind(op: Op) -> list[Axes]:
    """Return each position of an axis as an output of its own. All stay, since the code names each one."""
    x = op.axes(op["self"])
    dim = op.integer("dim") % len(x)
    op.freeze(x[dim], "taken apart position by position")
    return [(*x[:dim], *x[dim + 1 :]) for _ in range(len(x[dim]))]


def _choose(op: Op, dim: int, positions: Labels) -> Axes:
    x = op.axes(op.tensors()[0])
    return (*x[:dim], x[dim][positions], *x[dim + 1 :])


def positions_taken(node: fx.Node, size: int) -> Labels:
    """Return the positions of an axis of this size that ``aten.slice`` or ``aten.narrow`` takes."""
    positions = np.arange(size, dtype=np.int64)
    narrow = "narrow" in str(node.target)
    given: list[Any] = [*node.args[2:], None, None, None]
    for k, name in enumerate(("start", "length" if narrow else "end", "step")):
        given[k] = node.kwargs.get(name, given[k])
    start, end, step = (hint(v.meta["val"]) if isinstance(v, fx.Node) else v for v in given[:3])
    if narrow:
        return positions[start % size :][:end]
    return positions[start:end:step]


@rule("aten.slice.Tensor", "aten.narrow.default")
def slice_axis(op: Op) -> Axes:
    """Take a range of an axis, perhaps with a step.

    With a step, as in ``x[::2]``, the positions that stay may not be at equal distances any more, and then no
    slice takes them. A copy can stand in for the view as long as nothing is written to it. If something is,
    the axis is frozen.
    """
    dim = op.integer("dim") % len(op.axes(op["self"]))
    if op.get("step", 1) != 1 and op.node in op.walk.written:
        op.freeze(op.axes(op["self"])[dim], "written in steps")
    if op.is_computed:
        op.freeze(op.axes(op["self"])[dim], "cut where a computed number says")
    return _choose(op, dim, positions_taken(op.node, op.shape(op["self"])[dim]))


@rule("aten.select.int")
def select(op: Op) -> Axes:
    """Take one position of an axis. It stays, since the code names it by its number."""
    x = op.axes(op["self"])
    dim = op.integer("dim") % len(x)
    chosen = x[dim] if op.is_computed else x[dim][[op.integer("index")]]
    op.freeze(chosen, "selected by its number")
    return (*x[:dim], *x[dim + 1 :])


@rule("aten.flip.default")
def flip(op: Op) -> Axes:
    """Reverse axes, and their labels with them."""
    x = op.axes(op["self"])
    dims = {d % len(x) for d in op.integers(op["dims"])}
    return tuple(np.flip(a) if k in dims else a for k, a in enumerate(x))


@rule("aten.rot90.default")
def rot90(op: Op) -> Axes:
    """Turn two axes by quarters: at each turn they change places, and one of them is reversed."""
    x = list(op.axes(op["self"]))
    first, second = (d % len(x) for d in op.integers(op["dims"]))
    for _ in range(op.integer("k") % 4):
        x[first], x[second] = np.flip(x[second]), x[first]
    return tuple(x)


@rule("aten.roll.default")
def roll(op: Op) -> Axes:
    """Shift positions along axes; those pushed out at one end come in at the other."""
    x = list(op.axes(op["self"]))
    dims = op.integers(op.get("dims", []))
    if not dims:  # rolls the flattened tensor
        for axis in x:
            op.freeze(axis, "rolled across all axes")
        return tuple(x)
    for dim, shift in zip(dims, op.integers(op["shifts"]), strict=True):
        if op.is_computed:
            op.freeze(x[dim], "shifted by a computed number")
        x[dim] = np.roll(x[dim], shift)
    return tuple(x)


@rule("aten.pad.default", "aten.constant_pad_nd.default")
def pad(op: Op) -> Axes:
    """Pad axes, or crop them where an amount is negative.

    Zeros around an axis with units are new positions with free labels, which follow whatever they are
    combined with. Anything else freezes the axis: another mode copies units, and the layers behind would
    read another constant even where its unit is removed.
    """
    x = op.axes(op["self"])
    amounts = op.integers(op["pad"])
    constant = op.get("mode", "constant") == "constant"
    zero = not op.get("value", 0)
    out = list(x)
    for k in range(len(amounts) // 2):
        dim = len(x) - 1 - k
        before, after = amounts[2 * k : 2 * k + 2]
        if before == after == 0:
            continue
        if not constant or not zero:
            op.freeze(x[dim], "padded with something other than zeros")
        core = x[dim][max(-before, 0) : len(x[dim]) - max(-after, 0)]
        live = bool((core > 0).any()) and constant and zero
        edges = [op.store.fresh(max(n, 0)) if live else plain(max(n, 0)) for n in (before, after)]
        out[dim] = np.concatenate([edges[0], core, edges[1]])
    return tuple(out)


@rule("operator.getitem")
def getitem(op: Op) -> Axes:
    """Take one of several outputs, with its labels."""
    values, index = op.positional
    outputs: Any = op.walk.values[values]
    found: Axes = outputs[index]
    return found


@rule("aten.diagonal.default")
def diagonal(op: Op) -> Axes:
    """Take the diagonal of two axes as a new last axis. They are frozen, since it is found by counting."""
    x = op.axes(op["self"])
    counted = {d % len(x) for d in op.integers([op["dim1"], op["dim2"]])}
    for dim in counted:
        op.freeze(x[dim], "counted from a diagonal")
    return (*(axis for k, axis in enumerate(x) if k not in counted), plain(op.output_shape[-1]))
