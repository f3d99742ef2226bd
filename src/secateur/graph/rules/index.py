"""Rules for reading and writing the positions that an index tensor names, and for sorting."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from secateur.graph.rules.op import Axes, Op, plain
from secateur.graph.rules.registry import rule


def constant_positions(value: torch.Tensor | None, size: int) -> NDArray[np.int64] | None:
    """Return the positions that an index reads of an axis of this size; None if it is no constant vector."""
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
    """Read positions of one axis. A constant index keeps their labels; any other freezes the axis."""
    x = op.axes(op["self"])
    dim = op.integer("dim") % len(x)
    return _read(op, x, {dim: op["index"]})


@rule("aten.index.Tensor")
def index(op: Op) -> Axes:
    """Read ``x[:, a, b]``. The axes of the index tensors, broadcast, take the place of the indexed axes."""
    x = op.axes(op["self"])
    given = _indexed(op, len(x))
    return _read(op, x, given)


def _indexed(op: Op, rank: int) -> dict[int, fx.Node]:
    """Return the index tensor of each indexed axis. A mask with several axes indexes as many."""
    given: dict[int, fx.Node] = {}
    dim = 0
    for index in op["indices"]:
        masking = index is not None and index.meta["val"].dtype in (torch.bool, torch.uint8)
        for _ in range(len(op.axes(index)) if masking else 1):
            if index is not None:
                given[dim] = index
            dim += 1
    if dim > rank:
        raise ValueError("more indices than axes")
    return given


def _read(op: Op, x: Axes, given: dict[int, fx.Node]) -> Axes:
    rest = [a for k, a in enumerate(x) if k not in given]
    if len(given) == 1:
        ((dim, node),) = given.items()
        positions = constant_positions(op.walk.constants.get(node), len(x[dim]))
        if positions is not None:
            return (*x[:dim], x[dim][positions], *x[dim + 1 :])
    for dim in given:
        op.freeze(x[dim], "which positions are read depends on an index tensor")
    at = min(given) if _side_by_side(given) else 0
    shape = op.output_shape[at : len(op.output_shape) - len(rest) + at]
    return (*rest[:at], *_read_axes(op, given, shape), *rest[at:])


def _read_axes(op: Op, given: dict[int, fx.Node], shape: tuple[int, ...]) -> Axes:
    """Return the labels of the axes that take the place of the indexed ones; `shape` is their shape."""
    masks = [n for n in given.values() if n.meta["val"].dtype in (torch.bool, torch.uint8)]
    for node in masks:
        for axis in op.axes(node):
            op.freeze(axis, "a mask picks positions")
    if masks:
        for node in given.values():
            for axis in op.axes(node):
                op.freeze(axis, "read beside a mask")
        return tuple(plain(n) for n in shape)
    return op.broadcast(*(op.axes(node) for node in given.values()))


@rule("aten.index_put.default", "aten.index_put_.default")
def index_put(op: Op) -> Axes:
    """Write ``x[:, a, b] = values``. Indexed axes are frozen; the others are tied to those of `values`."""
    x, values = op.axes(op["self"]), op.axes(op["values"])
    given = _indexed(op, len(x))
    for dim in given:
        op.freeze(x[dim], "which positions are written depends on an index tensor")
    rest = [a for k, a in enumerate(x) if k not in given]
    at = min(given) if _side_by_side(given) else 0
    known = [op.axes(n) for n in given.values() if n.meta["val"].dtype not in (torch.bool, torch.uint8)]
    for node in given.values():
        for axis in op.axes(node):
            op.freeze(axis, "which positions are written depends on an index tensor")
    written = max(map(len, known), default=1)
    full = (*rest[:at], *(plain(1) for _ in range(written)), *rest[at:])
    for source, target in zip(values[::-1], full[::-1], strict=False):
        if len(source) == len(target):
            op.tie(source, target)
        else:
            op.freeze(source, "written by an index tensor")
    return x


def _side_by_side(given: dict[int, fx.Node]) -> bool:
    """Whether the indexed axes are neighbours. Only then does the result have its new axes in their place."""
    return sorted(given) == list(range(min(given), max(given) + 1))


@rule("aten.gather.default", "aten.take_along_dim.default")
def gather(op: Op) -> Axes:
    """Read along one axis, at positions that may differ along the other axes. Those keep their labels."""
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
            if k != dim:
                op.freeze(target, "reads another axis in part")
            out.append(target)
    return tuple(out)


@rule(
    "aten.index_add.default", "aten.index_add_.default", "aten.index_copy.default",
    "aten.index_copy_.default", "aten.index_reduce.default", "aten.index_reduce_.default",
)  # fmt: skip
def write_rows(op: Op) -> Axes:
    """Write rows of one tensor into rows of another, along one axis, which is frozen. The others are tied."""
    x, source = op.axes(op["self"]), op.axes(op["source"])
    dim = op.integer("dim") % len(x)
    op.freeze(x[dim], "which positions are written depends on an index tensor")
    op.freeze(source[dim], "written in part")
    op.freeze(op.axes(op["index"])[0], "which positions are written depends on it")
    rest = op.broadcast((*x[:dim], *x[dim + 1 :]), (*source[:dim], *source[dim + 1 :]))
    return (*rest[:dim], x[dim], *rest[dim:])


@rule(
    "aten.index_fill.int_Scalar",
    "aten.index_fill_.int_Scalar",
    "aten.index_fill.int_Tensor",
    "aten.index_fill_.int_Tensor",
)
def fill_rows(op: Op) -> Axes:
    """Write one number into rows along one axis, which is frozen."""
    x = op.axes(op["self"])
    op.freeze(x[op.integer("dim") % len(x)], "which positions are written depends on an index tensor")
    op.freeze(op.axes(op["index"])[0], "which positions are written depends on it")
    return x


@rule("aten.scatter_add.default", "aten.scatter_add_.default", "aten.scatter.src", "aten.scatter_.src")
@rule("aten.scatter_reduce.two", "aten.scatter_reduce_.two")
def scatter(op: Op) -> Axes:
    """Write along one axis, at positions that may differ along the other axes. Those keep their labels."""
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


@rule("aten.scatter.value", "aten.scatter_.value")
def scatter_value(op: Op) -> Axes:
    """Write one number to positions along an axis, as `scatter` writes those of a tensor."""
    x, index = op.axes(op["self"]), op.axes(op["index"])
    dim = op.integer("dim") % len(x)
    for k, (a, b) in enumerate(zip(x, index, strict=True)):
        if k != dim and len(a) == len(b):
            op.tie(a, b)
        else:
            op.freeze(a, "which positions are written depends on an index tensor")
            op.freeze(b, "which positions are written depends on an index tensor")
    return x


@rule("aten.masked_scatter.default", "aten.masked_scatter_.default", "aten.masked_select.default")
def masked_scatter(op: Op) -> Axes:
    """Write or read numbers in order where a mask is True. All axes are frozen, since the order counts."""
    for node in op.tensors():
        for axis in op.axes(node):
            op.freeze(axis, "taken in order where a mask is True")
    return (plain(op.output_shape[0]),) if "select" in op.name else op.axes(op["self"])


@rule("aten.slice_scatter.default")
def write_range(op: Op) -> Axes:
    """Write a tensor into a range of an axis, which is frozen. The others are tied."""
    x, source = op.axes(op["self"]), op.axes(op["src"])
    dim = op.integer("dim") % len(x)
    for axis in (x[dim], source[dim]):
        op.freeze(axis, "written in part")
    rest = op.broadcast((*x[:dim], *x[dim + 1 :]), (*source[:dim], *source[dim + 1 :]))
    return (*rest[:dim], x[dim], *rest[dim:])


@rule("aten.searchsorted.Tensor")
def search(op: Op) -> Axes:
    """Find each value's place in a sorted vector. The vector is frozen; several sorted rows freeze all."""
    rows, x = op.axes(op["sorted_sequence"]), op.axes(op["self"])
    for axis in (*rows, *(x if len(rows) > 1 else ()), *(a for n in op.tensors()[2:] for a in op.axes(n))):
        op.freeze(axis, "its order counts")
    return x


@rule("aten.argsort.default", "aten.argsort.stable")
def order(op: Op) -> Axes:
    """Say the order along one axis, which is frozen."""
    x = op.axes(op["self"])
    op.freeze(x[op.integer("dim") % len(x)], "put in order")
    return x


@rule("aten.topk.default", "aten.sort.default", "aten.sort.stable")
def ordered(op: Op) -> list[Axes]:
    """Sort along one axis, or take its largest values. The axis is frozen."""
    x = op.axes(op["self"])
    dim = op.integer("dim") % len(x)
    op.freeze(x[dim], "put in order")
    size = op.node.meta["val"][0].shape[dim]
    out = (*x[:dim], np.zeros(int(size), dtype=np.int64), *x[dim + 1 :])
    return [out, out]
