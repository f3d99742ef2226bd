"""Reductions, pooling and resampling."""

from __future__ import annotations

import re

from secateur.graph.rules.normalise import reduced
from secateur.graph.rules.op import Axes, Op, plain, shape_of
from secateur.graph.rules.registry import rule


@rule("aten.mean.dim", "aten.mean.default", "aten.sum.dim_IntList", "aten.sum.default", "aten.amax.default")
@rule(
    "aten.amin.default", "aten.max.dim", "aten.min.dim", "aten.prod.dim_int", "aten.var.dim", "aten.std.dim"
)
@rule(
    "aten.var.correction", "aten.std.correction", "aten.var_mean.correction", "aten.any.dim", "aten.all.dim"
)
@rule("aten.argmax.default", "aten.argmin.default", "aten.max.default", "aten.min.default")
@rule(
    "aten.var_mean.dim", "aten.var_mean.default", "aten.std_mean.correction", "aten.std_mean.dim",
    "aten.std_mean.default", "aten.var.default", "aten.std.default", "aten.prod.default",
    "aten.aminmax.default",
)  # fmt: skip
def reduction(op: Op) -> Axes | list[Axes]:
    """A reduction over an axis mixes its positions; the other axes pass."""
    x = op.axes(op.tensors()[0])
    dims = op.get("dim", [])
    dims = dims if isinstance(dims, list | tuple) else [dims]
    over = [d % len(x) for d in op.integers(dims)] if dims else list(range(len(x)))
    for dim in over:
        op.mix(x[dim])
    out = reduced(x, over, keepdim=bool(op.get("keepdim", False)))
    several = isinstance(op.node.meta["val"], list | tuple)
    return [out for _ in op.node.meta["val"]] if several else out


@rule(
    "aten.max_pool1d.default", "aten.max_pool2d.default", "aten.max_pool3d.default",
    "aten.avg_pool1d.default", "aten.avg_pool2d.default", "aten.avg_pool3d.default",
    "aten.adaptive_avg_pool1d.default", "aten.adaptive_avg_pool2d.default",
    "aten.adaptive_avg_pool3d.default", "aten.adaptive_max_pool1d.default",
    "aten.adaptive_max_pool2d.default", "aten.adaptive_max_pool3d.default",
    "aten._adaptive_avg_pool2d.default", "aten.max_pool2d_with_indices.default",
    "aten.max_pool1d_with_indices.default", "aten.max_pool3d_with_indices.default",
    "aten.upsample_nearest1d.vec", "aten.upsample_nearest2d.vec", "aten.upsample_nearest3d.vec",
    "aten.upsample_linear1d.vec", "aten.upsample_bilinear2d.vec", "aten.upsample_trilinear3d.vec",
    "aten.upsample_bicubic2d.vec", "aten._upsample_nearest_exact1d.vec",
    "aten._upsample_nearest_exact2d.vec", "aten._upsample_nearest_exact3d.vec",
    "aten._upsample_bilinear2d_aa.vec", "aten._upsample_bicubic2d_aa.vec",
    "aten.upsample_nearest1d.default", "aten.upsample_nearest2d.default", "aten.upsample_nearest3d.default",
    "aten.upsample_linear1d.default", "aten.upsample_bilinear2d.default",
    "aten.upsample_trilinear3d.default", "aten.upsample_bicubic2d.default", "aten.reflection_pad1d.default",
    "aten.reflection_pad2d.default", "aten.reflection_pad3d.default", "aten.replication_pad1d.default",
    "aten.replication_pad2d.default", "aten.replication_pad3d.default",
)  # fmt: skip
def resampling(op: Op) -> Axes | list[Axes]:
    """Only the axes that change size are resampled; units along those (rare) are frozen."""
    x = op.axes(op.tensors()[0])
    several = isinstance(op.node.meta["val"], list | tuple)
    shape = shape_of(op.node.meta["val"][0]) if several else op.output_shape
    space = len(x) - int(re.findall(r"(\d)d", op.name)[0])  # the channel axis may come first, without a batch
    for axis in x[space:]:
        op.freeze(axis, "resampled axis")
    out = (*x[:space], *(plain(n) for n in shape[space:]))
    return [out for _ in op.node.meta["val"]] if several else out
