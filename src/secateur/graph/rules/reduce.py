"""Rules for reductions, pooling, resampling and transforms of whole axes."""

from __future__ import annotations

import re

from secateur.graph.nodes import shape_of
from secateur.graph.rules.normalise import reduced
from secateur.graph.rules.op import Axes, Op, plain
from secateur.graph.rules.registry import rule

_WINDOW = "each position needs its neighbours"
"""Why an axis that is pooled, padded or resampled is frozen. LocalResponseNorm pools channels."""


@rule(
    "aten.mean.dim", "aten.mean.default", "aten.sum.dim_IntList", "aten.sum.default", "aten.amax.default",
    "aten.amin.default", "aten.max.dim", "aten.min.dim", "aten.prod.dim_int", "aten.var.dim",
    "aten.std.dim", "aten.var.correction", "aten.std.correction", "aten.var_mean.correction",
    "aten.any.dim", "aten.all.dim", "aten.argmax.default", "aten.argmin.default", "aten.max.default",
    "aten.min.default", "aten.var_mean.dim", "aten.var_mean.default", "aten.std_mean.correction",
    "aten.std_mean.dim", "aten.std_mean.default", "aten.var.default", "aten.std.default",
    "aten.prod.default", "aten.aminmax.default", "aten.median.default", "aten.median.dim",
    "aten.nanmedian.default", "aten.nanmedian.dim", "aten.mode.default", "aten.kthvalue.default",
    "aten.nansum.default", "aten.nanmean.default", "aten.count_nonzero.dim_IntList",
    "aten.count_nonzero.default", "aten.logsumexp.default", "aten.linalg_vector_norm.default",
    "aten.norm.ScalarOpt_dim", "aten.norm.Scalar", "aten.cosine_similarity.default",
    "aten.pairwise_distance.default", "aten.any.default", "aten.all.default", "aten.any.dims",
    "aten.all.dims", "aten.linalg_norm.default", "aten.linalg_matrix_norm.default",
    "aten.linalg_matrix_norm.str_ord",
)  # fmt: skip
def reduction(op: Op) -> Axes | list[Axes]:
    """Reduce over axes, whose positions are mixed. The other axes keep their labels."""
    x = op.broadcast(*(op.axes(n) for n in op.tensors()))
    dims = -1 if "pairwise" in op.name else op.get("dim", [])
    dims = dims if isinstance(dims, list | tuple) else [dims]
    over = [d % len(x) for d in op.integers(dims)] if dims else list(range(len(x)))
    for dim in over:
        op.mix(x[dim])
    return op.for_each_output(reduced(x, over, keepdim=bool(op.get("keepdim", False))))


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
    "aten._upsample_nearest_exact1d.default", "aten._upsample_nearest_exact2d.default",
    "aten._upsample_nearest_exact3d.default", "aten._upsample_bilinear2d_aa.default",
    "aten._upsample_bicubic2d_aa.default", "aten.upsample_nearest1d.default",
    "aten.upsample_nearest2d.default", "aten.upsample_nearest3d.default",
    "aten.upsample_linear1d.default", "aten.upsample_bilinear2d.default",
    "aten.upsample_trilinear3d.default", "aten.upsample_bicubic2d.default",
    "aten.reflection_pad1d.default", "aten.reflection_pad2d.default", "aten.reflection_pad3d.default",
    "aten.replication_pad1d.default", "aten.replication_pad2d.default", "aten.replication_pad3d.default",
    "aten.max_unpool2d.default", "aten.max_unpool3d.default",
)  # fmt: skip
def resampling(op: Op) -> Axes | list[Axes]:
    """Pool, resample or pad the axes of space, which are frozen. The other axes keep their labels."""
    x = op.broadcast(*(op.axes(n) for n in op.tensors()))
    several = isinstance(op.node.meta["val"], list | tuple)
    shape = shape_of(op.node.meta["val"][0]) if several else op.output_shape
    space = len(x) - int(re.findall(r"(\d)d", op.name)[0])  # the channel axis may come first, without a batch
    for axis in x[space:]:
        op.freeze(axis, _WINDOW)
    return op.for_each_output((*x[:space], *(plain(n) for n in shape[space:])))


@rule("aten.grid_sampler.default", "aten.grid_sampler_2d.default", "aten.grid_sampler_3d.default")
def grid_sample(op: Op) -> Axes:
    """Read a map [batch, channels, *space] at the points of a grid [batch, *out, coordinates]."""
    x, grid = op.axes(op["input"]), op.axes(op["grid"])
    for axis in (*x[2:], grid[-1]):
        op.freeze(axis, _WINDOW)
    (batch,) = op.broadcast(x[:1], grid[:1])
    return (batch, x[1], *grid[1:-1])


@rule("aten.affine_grid_generator.default")
def affine_grid(op: Op) -> Axes:
    """Make a grid [batch, *space, coordinates] from matrices [batch, coordinates, coordinates + 1]."""
    theta = op.axes(op["theta"])
    for axis in theta:
        op.freeze(axis, "its size is an argument")
    return (theta[0], *(plain(n) for n in op.output_shape[1:]))


@rule(
    "aten.fft_fft.default", "aten.fft_ifft.default", "aten.fft_rfft.default", "aten.fft_irfft.default",
    "aten.fft_hfft.default", "aten.fft_ihfft.default", "aten.fft_fft2.default", "aten.fft_ifft2.default",
    "aten.fft_rfft2.default", "aten.fft_irfft2.default", "aten.fft_fftn.default", "aten.fft_ifftn.default",
    "aten.fft_rfftn.default", "aten.fft_irfftn.default", "aten.fft_fftshift.default",
    "aten.fft_ifftshift.default", "aten.diff.default",
)  # fmt: skip
def along_axes(op: Op) -> Axes:
    """Transform whole axes, which are frozen. The other axes keep their labels."""
    x, shape = op.axes(op["self"]), op.output_shape
    dims = op.get("dim", range(len(x)))
    dims = {d % len(x) for d in ([dims] if isinstance(dims, int) else dims)}
    for dim in dims:
        op.freeze(x[dim], "transformed as a whole")
    for source in op.tensors()[1:]:  # `diff` joins two more tensors to its input
        for k, axis in enumerate(op.axes(source)):
            if k in dims:
                op.freeze(axis, "transformed as a whole")
            else:
                op.tie(axis, x[k])
    return tuple(plain(shape[k]) if k in dims else axis for k, axis in enumerate(x))


@rule("aten.stft.default", "aten.stft.center")
def spectrogram(op: Op) -> Axes:
    """Cut windows along the last axis and transform each. That axis is frozen."""
    x = op.axes(op["self"])
    for axis in (x[-1], *(a for n in op.tensors()[1:] for a in op.axes(n))):
        op.freeze(axis, "transformed as a whole")
    return (*x[:-1], *(plain(n) for n in op.output_shape[len(x) - 1 :]))


@rule(
    "aten.linalg_inv_ex.default", "aten.linalg_pinv.atol_rtol_tensor", "aten._linalg_solve_ex.default",
    "aten.linalg_solve_triangular.default", "aten._linalg_svd.default", "aten._linalg_eigh.default",
    "aten.linalg_qr.default", "aten.linalg_cholesky_ex.default", "aten._linalg_det.default",
    "aten._linalg_slogdet.default", "aten.linalg_matrix_exp.default",
)  # fmt: skip
def of_matrices(op: Op) -> Axes | list[Axes]:
    """Work on the matrices of the last two axes, which are frozen. The axes before them keep their labels."""
    values = op.node.meta["val"]
    several = isinstance(values, list | tuple)
    sources = [op.axes(n) for n in op.tensors()]
    matrices = [x for x in sources if len(x) == len(sources[0])]  # else vectors, or tolerances
    for axis in (a for x in sources for a in (x[-2:] if len(x) == len(sources[0]) else x)):
        op.freeze(axis, "transformed as a whole")
    batch = op.broadcast(*(x[:-2] for x in matrices))
    found = [
        (*batch, *(plain(n) for n in shape_of(v)[len(batch) :])) for v in (values if several else [values])
    ]
    return found if several else found[0]
