"""Reading positions by index tensors."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from secateur.graph.rules.op import Axes, Op, Walk
from secateur.graph.rules.registry import rule


def constant_positions(walk: Walk, index: fx.Node, size: int) -> NDArray[np.int64] | None:
    """The positions that a constant vector of integers reads of an axis; None if it is not one."""
    value = walk.constants.get(index)
    if (
        value is None
        or value.ndim != 1
        or value.is_floating_point()
        or value.dtype is torch.bool
        or value.is_meta
    ):
        return None
    positions: NDArray[np.int64] = value.cpu().numpy().astype(np.int64) % size
    return positions


@rule("aten.index_select.default")
def index_select(op: Op) -> Axes:
    """Positions of one axis: a constant index maps units, another needs them all."""
    x = op.axes(op["self"])
    dim = op.integer("dim") % len(x)
    return _read(op, x, {dim: op["index"]}, dim)


@rule("aten.index.Tensor")
def index(op: Op) -> Axes:
    """`x[:, a, b]`: the indexed axes become the axes of the (broadcast) index tensors."""
    x = op.axes(op["self"])
    given = {k: v for k, v in enumerate(op["indices"]) if v is not None}
    if any(v.meta["val"].dtype in (torch.bool, torch.uint8) for v in given.values()):
        raise ValueError("a mask picks a number of positions that depends on the data")
    dims = sorted(given)
    adjacent = dims == list(range(dims[0], dims[-1] + 1))
    return _read(op, x, given, dims[0] if adjacent else 0)


def _read(op: Op, x: Axes, given: dict[int, fx.Node], at: int) -> Axes:
    rest = [a for k, a in enumerate(x) if k not in given]
    if len(given) == 1:
        ((dim, node),) = given.items()
        positions = constant_positions(op.walk, node, len(x[dim]))
        if positions is not None:
            return (*x[:dim], x[dim][positions], *x[dim + 1 :])
    for dim in given:
        op.freeze(x[dim], "which positions are read depends on an index tensor")
    read = op.broadcast(*(op.axes(node) for node in given.values()))
    before = at if at else 0
    return (*rest[:before], *read, *rest[before:])


@rule("aten.gather.default", "aten.take_along_dim.default")
def gather(op: Op) -> Axes:
    """Positions along one axis chosen separately for each of the others, which stay what they are."""
    x = op.axes(op["self"])
    chosen = op.axes(op.get("index", op.get("indices")))
    dim = op.integer("dim") % len(x)
    op.freeze(x[dim], "which positions are read depends on an index tensor")
    out = []
    for k, (source, target) in enumerate(zip(x, chosen, strict=True)):
        if k != dim and len(source) == len(target):
            out.append(op.broadcast((source,), (target,))[0])
        else:
            op.freeze(source, "read in part")
            out.append(target)
    return tuple(out)


@rule(
    "aten.index_add.default", "aten.index_add_.default", "aten.index_copy.default", "aten.index_copy_.default"
)
def write_rows(op: Op) -> Axes:
    """Rows (along one axis) of a source written into rows of a tensor; the other axes are the same units."""
    x, source = op.axes(op["self"]), op.axes(op["source"])
    dim = op.integer("dim") % len(x)
    op.freeze(x[dim], "which positions are written depends on an index tensor")
    op.freeze(source[dim], "written in part")
    rest = op.broadcast((*x[:dim], *x[dim + 1 :]), (*source[:dim], *source[dim + 1 :]))
    return (*rest[:dim], x[dim], *rest[dim:])


@rule("aten.scatter_add.default", "aten.scatter_add_.default", "aten.scatter.src", "aten.scatter_.src")
@rule("aten.scatter_reduce.two", "aten.scatter_reduce_.two")
def scatter(op: Op) -> Axes:
    """Positions along one axis written separately for each of the others, which stay what they are."""
    x, source, index = op.axes(op["self"]), op.axes(op["src"]), op.axes(op["index"])
    dim = op.integer("dim") % len(x)
    out = []
    for k, (a, b, c) in enumerate(zip(x, source, index, strict=True)):
        if k != dim and len(a) == len(b) == len(c):
            out.append(op.broadcast((a,), (b,), (c,))[0])
        else:
            for axis in (a, b, c):
                op.freeze(axis, "which positions are written depends on an index tensor")
            out.append(a)
    return tuple(out)


@rule("aten.topk.default", "aten.sort.default", "aten.sort.stable")
def ordered(op: Op) -> list[Axes]:
    """Values and positions in order along one axis, all of which are needed."""
    x = op.axes(op["self"])
    dim = op.integer("dim") % len(x)
    op.freeze(x[dim], "put in order")
    size = op.node.meta["val"][0].shape[dim]
    out = (*x[:dim], np.zeros(int(size), dtype=np.int64), *x[dim + 1 :])
    return [out, out]
