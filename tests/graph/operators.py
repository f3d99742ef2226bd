"""A call of every operator that has a rule, to be run with units along any axis of any operand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

aten = torch.ops.aten


@dataclass(frozen=True)
class Operand:
    """A tensor argument.

    Attributes:
        shape: Its shape.
        kind: ``x``: an activation. ``w``: a parameter in most networks. ``i``: integers below `high`, from
            the model's input. ``m``: a mask, from the input. ``c``: complex numbers, made of activations.
        high: One more than the largest integer.
    """

    shape: tuple[int, ...]
    kind: str = "x"
    high: int = 0


@dataclass(frozen=True)
class Call:
    """One way to call an operator.

    Attributes:
        function: Calls it with the operands, and returns what it returns.
        operands: What it is called with.
        summed: Axes of the output whose length depends on the data.
    """

    function: Callable[..., Any]
    operands: tuple[Operand, ...]
    summed: tuple[int, ...] = ()


def x(*shape: int) -> Operand:
    return Operand(shape)


def w(*shape: int) -> Operand:
    return Operand(shape, "w")


def c(*shape: int) -> Operand:
    return Operand(shape, "c")


def i(high: int, *shape: int) -> Operand:
    return Operand(shape, "i", high)


def m(*shape: int) -> Operand:
    return Operand(shape, "m")


CALLS: dict[str, list[Call]] = {}
"""Operator -> calls of it."""


def call(names: str, function: Callable[..., Any], *operands: Operand, summed: tuple[int, ...] = ()) -> None:
    """Register a call for operators named with spaces between; `function` gets the operator first."""
    for name in names.split():
        packet, overload = name.split(".") if "." in name else (name, "default")
        target = getattr(getattr(aten, packet, None), overload, None)
        if target is not None:  # a few come and go between versions of torch
            bound = Call(lambda *a, f=function, t=target: f(t, *a), operands, summed)
            CALLS.setdefault(f"aten.{packet}.{overload}", []).append(bound)


def plainly(op: Any, *tensors: Any) -> Any:
    return op(*tensors)


# Sums of products

call("linear", plainly, x(3, 4, 5), w(6, 5), w(6))
call("matmul", plainly, x(2, 3, 4), x(2, 4, 5))
call("matmul", plainly, x(2, 3, 4), w(4, 5))
call("matmul", plainly, x(4), x(3, 4, 5))
call("mm", plainly, x(3, 4), x(4, 5))
call("bmm", plainly, x(2, 3, 4), x(2, 4, 5))
call("mv", plainly, x(3, 4), x(4))
call("dot", plainly, x(4), x(4))
call("addmm", plainly, w(5), x(3, 4), w(4, 5))
call("addmm", plainly, x(3, 5), x(3, 4), x(4, 5))
call("baddbmm", plainly, x(2, 3, 5), x(2, 3, 4), x(2, 4, 5))
call("addmv", plainly, x(3), x(3, 4), x(4))
call("bilinear", plainly, x(3, 4), x(3, 5), w(6, 4, 5), w(6))
call("bilinear", plainly, x(2, 3, 4), x(2, 3, 5), w(6, 4, 5))
call("outer ger", plainly, x(3), x(4))
call("tensordot", lambda op, a, b: op(a, b, [1, 2], [0, 1]), x(2, 3, 4), x(3, 4, 5))
call("tensordot", lambda op, a, b: op(a, b, [1, 2], [0, 1]), x(2, 3, 4), w(3, 4, 5))
call("einsum", lambda op, a, b: op("bij,bjk->bik", [a, b]), x(2, 3, 4), x(2, 4, 5))
call("einsum", lambda op, a, b: op("...ij,kj->...ik", [a, b]), x(2, 3, 4), w(5, 4))
call("einsum", lambda op, a: op("bij->ib", [a]), x(2, 3, 4))
call("einsum", lambda op, a, b: op("ij,j->i", [a, b]), x(3, 4), w(1))
call("cdist _cdist_forward", lambda op, a, b: op(a, b, 2.0, None), x(2, 3, 4), x(2, 5, 4))
call("scaled_dot_product_attention", plainly, x(2, 3, 4, 5), x(2, 3, 6, 5), x(2, 3, 6, 7))
call(
    "scaled_dot_product_attention",
    lambda op, q, k, v: op(q, k, v, is_causal=True),
    x(2, 3, 4, 5), x(2, 3, 4, 5), x(2, 3, 4, 5),
)  # fmt: skip
call(
    "scaled_dot_product_attention",
    lambda op, q, k, v, mask: op(q, k, v, attn_mask=mask),
    x(2, 3, 4, 5), x(2, 3, 6, 5), x(2, 3, 6, 5), x(4, 6),
)  # fmt: skip
call(
    "scaled_dot_product_attention",
    lambda op, q, k, v: op(q, k, v, enable_gqa=True),
    x(2, 6, 4, 5), x(2, 3, 4, 5), x(2, 3, 4, 5),
)  # fmt: skip
call("embedding", lambda op, ids, table: op(table, ids), i(6, 2, 3), w(6, 4))
call(
    "embedding_bag embedding_bag.padding_idx",
    lambda op, ids, table, offsets: op(table, ids, offsets % 1, False, 0, False, None, False, *_last(op)),
    i(6, 5), w(6, 4), i(1, 3),
)  # fmt: skip


def _last(op: Any) -> tuple[None, ...]:
    return (None,) if "padding_idx" in str(op) else ()


# Convolutions

for rank in (1, 2, 3):
    space, kernel = (5, 6, 7)[:rank], (3, 2, 2)[:rank]
    call(f"conv{rank}d conv{rank}d.padding", plainly, x(2, 4, *space), w(6, 4, *kernel), w(6))
    call(f"conv{rank}d", plainly, x(2, 4, *space), w(6, 4, *[1] * rank))
    call(f"conv{rank}d", lambda op, a, b: op(a, b, None, [2], [1]), x(2, 4, *space), w(6, 4, *[1] * rank))
    call(
        f"conv{rank}d",
        lambda op, a, b, r=rank: op(a, b, None, [1] * r, [0] * r, [1] * r, 2),
        x(2, 4, *space), w(6, 2, *kernel),
    )  # fmt: skip
    name = "conv_transpose1d.default" if rank == 1 else f"conv_transpose{rank}d.input"
    call(name, plainly, x(2, 4, *space), w(4, 6, *kernel), w(6))
    call(name, plainly, x(2, 4, *space), w(4, 6, *[1] * rank))
    call(
        name,
        lambda op, a, b, r=rank: op(a, b, None, [1] * r, [0] * r, [0] * r, 2),
        x(2, 4, *space), w(4, 3, *kernel),
    )  # fmt: skip
call("conv2d", lambda op, a, b: op(a, b, None, [1, 1], [1, 1], [1, 1], 4), x(2, 4, 5, 6), w(4, 1, 3, 3))
call("conv2d", plainly, x(4, 5, 6), w(6, 4, 3, 3))
call("conv2d", plainly, x(2, 1, 5, 6), w(4, 1, 3, 6))
call("conv1d.padding", lambda op, a, b: op(a, b, None, [1], "same"), x(2, 4, 5), w(6, 4, 3))
for transposed in (False, True):
    call(
        "convolution",
        lambda op, a, b, t=transposed: op(a, b, None, [1, 1], [0, 0], [1, 1], t, [0, 0], 1),
        x(2, 4, 5, 6), w(4, 4, 3, 3),
    )  # fmt: skip

# Position by position

call(
    "relu gelu sigmoid neg clone contiguous detach alias positive nan_to_num zeros_like", plainly, x(2, 3, 4)
)
call("ones_like lift_fresh_copy resolve_conj resolve_neg conj real", plainly, x(2, 3, 4))
call("add.Tensor mul.Tensor atan2 copy copy_", plainly, x(2, 3, 4), x(2, 3, 4))
call("mul.Tensor", plainly, x(2, 3, 4), x(3, 1))
call("where.self", lambda op, a, b, e: op(a > 0, b, e), x(2, 3, 4), x(2, 3, 4), x(4))
call("where.ScalarOther", lambda op, a, b: op(a > 0, b, 2.0), x(2, 3, 4), x(2, 3, 4))
call("where.ScalarSelf", lambda op, a, b: op(a > 0, 2.0, b), x(2, 3, 4), x(2, 3, 4))
call("where.Scalar", lambda op, a: op(a > 0, 2.0, 3.0).to(a), x(2, 3, 4))
call("_conj", lambda op, a: op(torch.view_as_complex(a)), x(3, 4, 2))
call("real imag", plainly, c(3, 4))
call("_to_copy", plainly, x(2, 3, 4))
call("to.dtype", lambda op, a: op(a, torch.float64), x(2, 3, 4))
call("to.device", lambda op, a: op(a, "cpu", torch.float64), x(2, 3, 4))
call("to.dtype_layout", lambda op, a: op(a, dtype=torch.float64), x(2, 3, 4))
call("to.other type_as", plainly, x(2, 3, 4), x(5))
call(
    "dropout feature_dropout alpha_dropout feature_alpha_dropout", lambda op, a: op(a, 0.5, False), x(2, 3, 4)
)
call("dropout_ feature_dropout_ alpha_dropout_", lambda op, a: op(a.clone(), 0.5, False), x(2, 3, 4))
call("native_dropout", lambda op, a: op(a, 0.5, False), x(2, 3, 4))
call("detach_ zero_", lambda op, a: op(a.clone()), x(2, 3, 4))
call("fill.Scalar fill_.Scalar full_like", lambda op, a: op(a.clone(), 2.0), x(2, 3, 4))
call("fill.Tensor fill_.Tensor", lambda op, a: op(a.clone(), torch.tensor(2.0)), x(2, 3, 4))
call(
    "bernoulli poisson bernoulli_.float rand_like randn_like empty_like",
    lambda op, a: op(a * 0).zero_(),
    x(2, 3, 4),
)
call("prelu", plainly, x(2, 3, 4), w(3))
call("glu", lambda op, a: op(a, 1), x(2, 6, 4))
call("view_as_real", plainly, c(3, 4))
call("view_as_complex", plainly, x(3, 4, 2))
call("tril triu", plainly, x(2, 4, 5))
call("tril_ triu_", lambda op, a: op(a.clone()), x(2, 4, 5))
call("one_hot", lambda op, a: op((a > 0).long(), 3), x(2, 4))
call("broadcast_tensors", lambda op, a, b: op([a, b]), x(2, 3, 1), x(3, 4))
call("meshgrid", lambda op, a, b: op([a, b]), x(3), x(4))
call("meshgrid.indexing", lambda op, a, b: op([a, b], indexing="xy"), x(3), x(4))
call(
    "rand_like.generator randn_like.generator",
    lambda op, a: op(a * 0, generator=torch.Generator()).zero_(),
    x(2, 3, 4),
)
call("randint_like", lambda op, a: op(a, 5).zero_() + a, x(2, 3, 4))
call("randint_like.low_dtype", lambda op, a: op(a, 2, 5).zero_() + a, x(2, 3, 4))
call("randint_like.generator", lambda op, a: op(a, 5, generator=None).zero_() + a, x(2, 3, 4))
call("randint_like.low_generator_dtype", lambda op, a: op(a, 2, 5, generator=None).zero_() + a, x(2, 3, 4))
call(
    "normal_ uniform_ exponential_ cauchy_ log_normal_ random_",
    lambda op, a: op(a * 0).zero_() + a,
    x(2, 3, 4),
)
call("geometric_", lambda op, a: op(a * 0, 0.5).zero_() + a, x(2, 3, 4))
call("random_.to", lambda op, a: op(a * 0, 5).zero_() + a, x(2, 3, 4))
call("normal.Tensor_float", lambda op, a: op(a, 0.0), x(2, 3, 4))
call("normal.float_Tensor", lambda op, a: op(2.0, a.abs()) * 0 + a, x(2, 3, 4))
call("normal.Tensor_Tensor", lambda op, a, b: op(a, b.abs()) * 0 + a + b, x(2, 3, 4), x(2, 3, 4))
call("normal.float_float", lambda op, a: a + op(0.0, 1.0, [2, 3, 4]).zero_(), x(2, 3, 4))
call("rand.generator randn.generator", lambda op, a: a + op([2, 3, 4], generator=None).zero_(), x(2, 3, 4))
call("randint", lambda op, a: a + op(5, [2, 3, 4]).zero_(), x(2, 3, 4))
call("randint.low", lambda op, a: a + op(2, 5, [2, 3, 4]).zero_(), x(2, 3, 4))
call("randint.generator", lambda op, a: a + op(5, [2, 3, 4], generator=None).zero_(), x(2, 3, 4))
call("randint.low_generator", lambda op, a: a + op(2, 5, [2, 3, 4], generator=None).zero_(), x(2, 3, 4))
call("randperm", lambda op, a: a + 0 * op(4), x(2, 3, 4))
call("randperm.generator", lambda op, a: a + 0 * op(4, generator=None), x(2, 3, 4))
for name in "zeros ones empty.memory_format rand randn new_zeros new_ones new_empty".split():
    size = "new" in name
    call(name, lambda op, a, n=size: a + op(*[a] * n, [2, 3, 4]).zero_(), x(2, 3, 4))
call("full", lambda op, a: a + op([2, 3, 4], 1.5), x(2, 3, 4))
call("new_full", lambda op, a: a + op(a, [2, 3, 4], 1.5), x(2, 3, 4))
call("arange", lambda op, a: a + op(4), x(2, 3, 4))
call("arange.start linspace", lambda op, a: a + op(0, 4, *[4] * ("linspace" in str(op))), x(2, 3, 4))
call("arange.start_step", lambda op, a: a + op(0, 8, 2), x(2, 3, 4))
call("eye", lambda op, a: a + op(4), x(2, 4, 4))
call("eye.m", lambda op, a: a + op(3, 4), x(2, 3, 4))
call("scalar_tensor", lambda op, a: a + op(4), x(2, 3, 4))
call("tril_indices triu_indices", lambda op, a: a + op(3, 3), x(2, 6))

# Normalisation and reductions


def stored(mean: torch.Tensor, variance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Statistics as a layer stores them."""
    return mean.detach(), variance.detach().abs() + 1


for training in (False, True):
    call(
        "batch_norm",
        lambda op, a, g, b, *s, t=training: op(a, g, b, *stored(*s), t, 0.0, 1e-5, False),
        x(3, 4, 5), w(4), w(4), w(4), w(4),
    )  # fmt: skip
    call(
        "native_batch_norm",
        lambda op, a, g, b, *s, t=training: op(a, g, b, *stored(*s), t, 0.0, 1e-5)[0],
        x(3, 4, 5), w(4), w(4), w(4), w(4),
    )  # fmt: skip
    call(
        "instance_norm",
        lambda op, a, g, b, *s, t=training: op(a, g, b, *stored(*s), t, 0.0, 1e-5, False),
        x(3, 4, 5), w(4), w(4), w(4), w(4),
    )  # fmt: skip
call(
    "batch_norm instance_norm",
    lambda op, a: op(a, None, None, None, None, True, 0.0, 1e-5, False),
    x(3, 4, 5),
)
call(
    "_native_batch_norm_legit_no_training",
    lambda op, a, g, b, *s: op(a, g, b, *stored(*s), 0.0, 1e-5)[0],
    x(3, 4, 5), w(4), w(4), w(4), w(4),
)  # fmt: skip
call("layer_norm", lambda op, a, g, b: op(a, [4, 5], g, b), x(3, 4, 5), w(4, 5), w(4, 5))
call("rms_norm", lambda op, a, g: op(a, [5], g, 1e-6), x(3, 4, 5), w(5))
call("group_norm", lambda op, a, g, b: op(a, 3, g, b), x(2, 6, 5), w(6), w(6))
call("group_norm", lambda op, a: op(a, 1), x(2, 6, 5))
call(
    "softmax.int log_softmax.int special_softmax special_log_softmax "
    "cumsum cumprod logcumsumexp cummax cummin",
    lambda op, a: op(a, 1),
    x(2, 3, 4),
)
call("_softmax _log_softmax", lambda op, a: op(a, -1, False), x(2, 3, 4))
call("renorm", lambda op, a: op(a, 2, 1, 0.1), x(2, 3, 4))
call("renorm_", lambda op, a: op(a.clone(), 2, -1, 0.1), x(2, 3, 4))
call("_weight_norm", lambda op, v, g: op(v, g, 0), x(3, 4, 5), x(3, 1, 1))
call("_weight_norm", lambda op, v, g: op(v, g, 0), w(3, 4, 5), w(3, 1, 1))
LISTS = "mean.dim sum.dim_IntList amax amin logsumexp var.dim std.dim var_mean.dim std_mean.dim"
call(f"{LISTS} nansum count_nonzero.dim_IntList any.dims all.dims", lambda op, a: op(a, [0, 2]), x(2, 3, 4))
call(LISTS, lambda op, a: op(a, [1], **{"keepdim": True}), x(2, 3, 4))
call(
    "max.dim min.dim median.dim nanmedian.dim mode prod.dim_int argmax argmin any.dim all.dim",
    lambda op, a: op(a, 1), x(2, 3, 4),
)  # fmt: skip
call("kthvalue", lambda op, a: op(a, 2, 1), x(2, 3, 4))
call(
    "mean sum prod max min var std var_mean std_mean median nanmedian aminmax any all count_nonzero",
    plainly, x(2, 3, 4),
)  # fmt: skip
call("aminmax", lambda op, a: op(a, dim=1), x(2, 3, 4))
for name in "var.correction std.correction var_mean.correction std_mean.correction".split():
    call(name, lambda op, a: op(a, [1], correction=0), x(2, 3, 4))
call("nanmean", lambda op, a: op(a, [1]), x(2, 3, 4))
call("linalg_vector_norm", lambda op, a: op(a, 2, [1]), x(2, 3, 4))
call("linalg_matrix_exp", plainly, x(2, 3, 3))
for matrices in ("linalg_inv_ex", "_linalg_det", "_linalg_slogdet", "linalg_qr"):
    call(matrices, lambda op, a: op(a @ a.mT + torch.eye(3))[0], x(2, 3, 3))
call("linalg_pinv.atol_rtol_tensor", plainly, x(2, 3, 4))
call("_linalg_svd", lambda op, a: op(a)[1], x(2, 3, 4))
call("_linalg_eigh linalg_cholesky_ex", lambda op, a: op(a @ a.mT + torch.eye(3))[0], x(2, 3, 3))
call("_linalg_solve_ex", lambda op, a, b: op(a @ a.mT + torch.eye(3), b)[0], x(2, 3, 3), x(2, 3, 4))
call(
    "linalg_solve_triangular",
    lambda op, a, b: op(a.triu() + 9 * torch.eye(3), b, upper=True),
    x(2, 3, 3),
    x(2, 3, 4),
)
call("linalg_norm", lambda op, a: op(a, None, [1]), x(2, 3, 4))
call("linalg_matrix_norm", lambda op, a: op(a, 2), x(2, 3, 4))
call("linalg_matrix_norm.str_ord", lambda op, a: op(a, "fro", [0, 2]), x(2, 3, 4))
call("norm.ScalarOpt_dim", lambda op, a: op(a, 2, [1]), x(2, 3, 4))
call("norm.Scalar", lambda op, a: op(a, 2), x(2, 3, 4))
call("cosine_similarity", lambda op, a, b: op(a, b, 1), x(2, 3, 4), x(2, 3, 4))
call("pairwise_distance", plainly, x(2, 3, 4), x(2, 3, 4))

# Space and time

for rank in (1, 2, 3):
    space = (4, 6, 8)[:rank]
    twice = [2 * n for n in space]
    d = f"{rank}d"
    names = f"max_pool{d} avg_pool{d} max_pool{d}_with_indices"
    call(names, lambda op, a, r=rank: op(a, [2] * r, [2] * r), x(2, 3, *space))
    call(f"avg_pool{d}", lambda op, a, r=rank: op(a, [2] * r, [2] * r), x(3, *space))
    names = f"adaptive_avg_pool{d} adaptive_max_pool{d}" + " _adaptive_avg_pool2d" * (rank == 2)
    call(names, lambda op, a, r=rank: op(a, [2] * r), x(2, 3, *space))
    nearest = f"upsample_nearest{d} _upsample_nearest_exact{d}"
    smooth = ("upsample_linear1d", "upsample_bilinear2d upsample_bicubic2d", "upsample_trilinear3d")[rank - 1]
    smooth += " _upsample_bilinear2d_aa _upsample_bicubic2d_aa" * (rank == 2)
    for name in nearest.split():
        call(f"{name}.vec", lambda op, a, t=twice: op(a, t, None), x(2, 3, *space))
        call(f"{name}.default", lambda op, a, t=twice: op(a, t), x(2, 3, *space))
    for name in smooth.split():
        call(f"{name}.vec", lambda op, a, t=twice: op(a, t, False, None), x(2, 3, *space))
        call(f"{name}.default", lambda op, a, t=twice: op(a, t, False), x(2, 3, *space))
    pads = f"reflection_pad{d} replication_pad{d}"
    call(pads, lambda op, a, r=rank: op(a, [1] * 2 * r), x(2, 3, *space))
call("max_unpool2d", lambda op, a, n: op(a, n, [4, 4]), x(2, 3, 2, 2), i(16, 2, 3, 2, 2))
call(
    "max_unpool2d",
    lambda op, a: op(*aten.max_pool2d_with_indices(a, [2, 2]), [4, 4]),
    x(2, 3, 4, 4),
)  # fmt: skip
call(
    "max_unpool3d",
    lambda op, a, n: op(a, n, [4, 4, 4], [2] * 3, [0] * 3),
    x(2, 3, 2, 2, 2), i(64, 2, 3, 2, 2, 2),
)  # fmt: skip
call(
    "grid_sampler grid_sampler_2d",
    lambda op, a, g: op(a, g.tanh(), 0, 0, False),
    x(2, 3, 4, 5), x(2, 6, 7, 2),
)  # fmt: skip
call("grid_sampler_3d", lambda op, a, g: op(a, g.tanh(), 0, 0, False), x(2, 3, 4, 5, 6), x(2, 3, 4, 5, 3))
call("affine_grid_generator", lambda op, t: op(t, [2, 3, 4, 5], False), x(2, 2, 3))
call("affine_grid_generator", lambda op, t: op(t, [2, 1, 2, 4, 5], False), x(2, 3, 4))
call("fft_fft fft_ifft fft_rfft fft_ihfft", lambda op, a: op(a, None, 1), x(2, 3, 4))
call("fft_fft2 fft_ifft2 fft_rfft2 fft_fftn fft_rfftn", plainly, x(2, 3, 4))
call("fft_ifftn", lambda op, a: op(a, None, [0, 2]), x(2, 3, 4))
call("fft_irfft fft_hfft", lambda op, a: op(a, None, 1), c(2, 3, 4))
call("fft_irfft2 fft_irfftn", plainly, c(2, 3, 4))
call("fft_fftshift fft_ifftshift", lambda op, a: op(a, [1]), x(2, 3, 4))
call("diff", lambda op, a: op(a, 1, 1), x(2, 3, 4))
call("diff", lambda op, a, b: op(a, 1, 1, b), x(2, 3, 4), x(2, 1, 4))
call("stft", lambda op, a, v: op(a, 4, 2, 4, v, False, True, True), x(2, 12), x(4))
call("stft.center", lambda op, a: op(a, 4, 2, 4, None, True, "reflect", False, True, True), x(2, 12))
call("im2col", lambda op, a: op(a, [2, 2], [1, 1], [0, 0], [1, 1]), x(2, 3, 4, 5))
call("col2im", lambda op, a: op(a, [4, 5], [2, 2], [1, 1], [0, 0], [1, 1]), x(2, 12, 12))
call("unfold", lambda op, a: op(a, 1, 2, 2), x(2, 6, 4))
call("pixel_shuffle", lambda op, a: op(a, 2), x(2, 8, 3, 4))
call("pixel_unshuffle", lambda op, a: op(a, 2), x(2, 3, 4, 6))
call("channel_shuffle", lambda op, a: op(a, 2), x(2, 6, 3, 4))

# Recurrent layers

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
for name, gates in GATES.items():
    lstm = name == "lstm"
    for first in (False, True):
        call(
            f"{name}.input",
            lambda op, a, h, cell, *ps, s=lstm, f=first: op(
                a, [h, cell] if s else h + 0 * cell, list(ps), True, 1, 0.0, False, False, f
            ),
            x(*((2, 3) if first else (3, 2)), 4), x(1, 2, 5), x(1, 2, 5),
            w(gates * 5, 4), w(gates * 5, 5), w(gates * 5), w(gates * 5),
        )  # fmt: skip
    call(
        f"{name}.data",
        lambda op, a, h, cell, *ps, s=lstm: op(
            a, torch.tensor([2, 2, 1]), [h, cell] if s else h + 0 * cell, list(ps), True, 1, 0.0, False, False
        ),
        x(5, 4), x(1, 2, 5), x(1, 2, 5), w(gates * 5, 4), w(gates * 5, 5), w(gates * 5), w(gates * 5),
    )  # fmt: skip
    call(
        f"{name}_cell",
        lambda op, a, h, cell, *ps, s=lstm: op(a, [h, cell] if s else h + 0 * cell, *ps),
        x(2, 4), x(2, 5), x(2, 5), w(gates * 5, 4), w(gates * 5, 5), w(gates * 5), w(gates * 5),
    )  # fmt: skip

# Views

call("view reshape _unsafe_view", lambda op, a: op(a, [2, 12]), x(2, 3, 4))
call("view reshape", lambda op, a: op(a, [2, 3, 2, 2]), x(2, 3, 4))
call("_reshape_alias", lambda op, a: op(a, [2, 12], [12, 1]), x(2, 3, 4))
call("flatten.using_ints ravel", plainly, x(2, 3, 4))
call("unflatten.int", lambda op, a: op(a, 2, [2, 2]), x(2, 3, 4))
call("view_as reshape_as", lambda op, a, b: op(a, b), x(2, 6), x(2, 3, 2))
call("squeeze", plainly, x(2, 1, 4))
call("squeeze.dim", lambda op, a: op(a, 1), x(2, 1, 4))
call("squeeze.dims", lambda op, a: op(a, [1]), x(2, 1, 4))
call("squeeze_.dim", lambda op, a: op(a.clone(), 1), x(2, 1, 4))
call("unsqueeze", lambda op, a: op(a, 1), x(2, 3))
call("unsqueeze_", lambda op, a: op(a.clone(), 1), x(2, 3))
call(
    "permute movedim.intlist", lambda op, a: op(a, [2, 0, 1], *[[0, 1, 2]] * ("move" in str(op))), x(2, 3, 4)
)
call("movedim.int transpose.int swapaxes swapdims", lambda op, a: op(a, 0, 2), x(2, 3, 4))
call("transpose_", lambda op, a: op(a.clone(), 0, 2), x(2, 3, 4))
call("t numpy_T mT adjoint", plainly, x(3, 4))
call("t_", lambda op, a: op(a.clone()), x(3, 4))
call("expand broadcast_to", lambda op, a: op(a, [2, 3, 4]), x(2, 1, 4))
call("expand_as", plainly, x(1, 4), x(2, 3, 4))
call("repeat tile", lambda op, a: op(a, [1, 2, 1]), x(2, 3, 4))
call("repeat", lambda op, a: op(a, [2, 1, 2]), x(3, 1))
call("repeat_interleave.self_int", lambda op, a: op(a, 2, 1), x(2, 3, 4))

# Joining, cutting, choosing

call("cat concat concatenate", lambda op, a, b: op([a, b], 1), x(2, 3, 4), x(2, 2, 4))
call("hstack", lambda op, a, b: op([a, b]), x(2, 3, 4), x(2, 2, 4))
call("vstack", lambda op, a, b: op([a, b]), x(2, 3, 4), x(3, 3, 4))
call("stack", lambda op, a, b: op([a, b], 1), x(2, 3), x(2, 3))
call("split.Tensor", lambda op, a: op(a, 2, 1), x(2, 6, 4))
call("split.sizes split_with_sizes", lambda op, a: op(a, [2, 4], 1), x(2, 6, 4))
call("chunk unsafe_chunk tensor_split.sections", lambda op, a: op(a, 2, 1), x(2, 6, 4))
call("tensor_split.indices", lambda op, a: op(a, [2], 1), x(2, 6, 4))
call("unbind.int", lambda op, a: op(a, 1), x(2, 3, 4))
call("slice.Tensor", lambda op, a: op(a, 1, 1, 5, 2), x(2, 6, 4))
call("narrow", lambda op, a: op(a, 1, 1, 3), x(2, 6, 4))
call("select.int", lambda op, a: op(a, 1, 1), x(2, 3, 4))
call("flip", lambda op, a: op(a, [1, 2]), x(2, 3, 4))
for quarters in range(4):
    call("rot90", lambda op, a, k=quarters: op(a, k, [1, 2]), x(2, 3, 4))
call("roll", lambda op, a: op(a, [1], [1]), x(2, 3, 4))
call("roll", lambda op, a: op(a, [1]), x(3, 4))
call("pad constant_pad_nd", lambda op, a: op(a, [1, 0, 0, 2]), x(2, 3, 4))
call("pad", lambda op, a: op(a, [1, 1], "reflect"), x(2, 3, 4))
call("pad", lambda op, a: op(a, [-1, 1], "constant", 1.0), x(2, 3, 4))
call("index_select", lambda op, a, n: op(a, 1, n), x(2, 3, 4), i(3, 5))
call("index_select", lambda op, a: op(a, 1, torch.tensor([2, 0])), x(2, 3, 4))
call("index.Tensor", lambda op, a, n: op(a, [None, n]), x(2, 3, 4), i(3, 5, 2))
call("index.Tensor", lambda op, a, n, k: op(a, [n, None, k]), x(2, 3, 4), i(2, 5), i(4, 5))
call("index.Tensor", lambda op, a: op(a, [None, torch.tensor([2, 0])]), x(2, 3, 4))
call("index.Tensor", lambda op, a, mask: op(a, [mask]), x(2, 3, 4), m(2), summed=(0,))
call("index.Tensor", lambda op, a, mask: op(a, [None, mask]), x(2, 3, 4, 5), m(3, 4), summed=(1,))
call(
    "index_put index_put_",
    lambda op, a, n, v: op(a.clone(), [None, n], v),
    x(2, 3, 4), i(3, 2), x(2, 2, 4),
)  # fmt: skip
call("index_put", lambda op, a, mask, v: op(a, [mask], v), x(2, 3, 4), m(2), x(4))
call("slice_scatter", lambda op, a, b: op(a, b, 1, 1, 3), x(2, 4, 3), x(2, 2, 3))
call("masked_select", plainly, x(2, 3), m(2, 3), summed=(0,))
call("searchsorted.Tensor", lambda op, a, b: op(a.sort(0)[0], b) + b, x(5), x(2, 3))
call("searchsorted.Tensor", lambda op, a, b: op(a.sort(1)[0], b) + b, x(2, 5), x(2, 3))
call("diagonal", lambda op, a: op(a, 0, 0, 2), x(3, 4, 3))
call("frexp.Tensor", lambda op, a: op(a)[0], x(2, 3, 4))
call("gather", lambda op, a, n: op(a, 1, n), x(2, 3, 4), i(3, 2, 5, 4))
call("gather", lambda op, a, n: op(a, 1, n), x(2, 3, 4), i(3, 2, 5, 3))
call("gather", lambda op, a, n: op(a, 0, n[:, None].expand(5, 4)), x(3, 4), i(3, 5))
call("take_along_dim", lambda op, a, n: op(a, n, 1), x(2, 3, 4), i(3, 2, 5, 4))
rows = "index_add index_add_ index_copy index_copy_"
call(
    "index_reduce index_reduce_",
    lambda op, a, n, v: op(a.clone(), 1, n, v, "amax"),
    x(2, 3, 4),
    i(3, 2),
    x(2, 2, 4),
)
call(
    "index_fill.int_Scalar index_fill_.int_Scalar",
    lambda op, a, n: op(a.clone(), 1, n, 2.0),
    x(2, 3, 4),
    i(3, 2),
)
call(
    "index_fill.int_Tensor index_fill_.int_Tensor",
    lambda op, a, n: op(a.clone(), 1, n, torch.tensor(2.0, dtype=a.dtype)),
    x(2, 3, 4), i(3, 2),
)  # fmt: skip
call("argsort", lambda op, a: op(a, 1).to(a.dtype) + a.sum(1, keepdim=True), x(2, 3, 4))
call(
    "argsort.stable", lambda op, a: op(a, stable=True, dim=1).to(a.dtype) + a.sum(1, keepdim=True), x(2, 3, 4)
)
call(rows, lambda op, a, n, v: op(a.clone(), 1, n, v), x(2, 3, 4), i(3, 2), x(2, 2, 4))
for sizes in ((2, 3, 4), (2, 2, 3)):
    call("scatter_add scatter_add_ scatter.src scatter_.src",
         lambda op, a, n, v: op(a.clone(), 1, n % 1 + torch.arange(n.shape[1])[:, None], v),
         x(2, 3, 4), i(1, *sizes), x(*sizes))  # fmt: skip
call(
    "scatter_add scatter.src",
    lambda op, a, n, v: op(a.clone(), 0, n[:, None].expand(2, 4), v),
    x(3, 4), i(3, 2), x(2, 4),
)  # fmt: skip
call(
    "scatter_reduce.two scatter_reduce_.two",
    lambda op, a, n, v: op(a.clone(), 1, n, v, "amax"),
    x(2, 3, 4), i(3, 2, 3, 4), x(2, 3, 4),
)  # fmt: skip
call("scatter.value scatter_.value", lambda op, a, n: op(a.clone(), 1, n, 2.0), x(2, 3, 4), i(3, 2, 1, 4))
call(
    "masked_scatter masked_scatter_",
    lambda op, a, mask, v: op(a.clone(), mask, v),
    x(2, 3, 4), m(2, 3, 4), x(2, 3, 4),
)  # fmt: skip
call("topk", lambda op, a: op(a, 2, 1), x(2, 3, 4))
call("sort", lambda op, a: op(a, 1), x(2, 3, 4))
call("sort.stable", lambda op, a: op(a, stable=True, dim=1), x(2, 3, 4))

# Without a rule, since others make them up

call("absolute arctan fix square isreal", lambda op, a: op(a) + a, x(2, 3, 4))
call("less.Scalar greater.Scalar", lambda op, a: op(a, 0.1) * a, x(2, 3, 4))
call("moveaxis.int", lambda op, a: op(a, 0, 2), x(2, 3, 4))
call("fliplr flipud atleast_3d msort", plainly, x(3, 4))
call("inner linalg_matmul", lambda op, a, b: op(a, b), x(2, 3, 4), w(4, 4))
call("linalg_vecdot", lambda op, a, b: op(a, b, dim=1), x(2, 3, 4), x(2, 3, 4))
call("column_stack dstack row_stack", lambda op, a, b: op([a, b]), x(2, 3), x(2, 3))
call("hsplit.int", lambda op, a: op(a, 2), x(2, 6, 4))
call("quantile.scalar nanquantile.scalar", lambda op, a: op(a, 0.3, 1), x(2, 3, 4))
call("quantile", lambda op, a: op(a, torch.tensor([0.2, 0.7]).double(), 1, True), x(2, 3, 4))
call("trapezoid.dx cumulative_trapezoid.dx", lambda op, a: op(a, dim=1), x(2, 3, 4))
call("gradient.scalarint", lambda op, a: op(a, dim=1), x(2, 3, 4))
call("kron", plainly, x(2, 3), x(1, 4))
call("addr", plainly, x(3, 4), x(3), x(4))
call("mse_loss smooth_l1_loss", plainly, x(2, 3, 4), x(2, 3, 4))
call("huber_loss", lambda op, a, b: op(a, b, 0), x(2, 3, 4), x(2, 3, 4))
call("cross_entropy_loss", plainly, x(5, 4), i(4, 5))
call("native_layer_norm", lambda op, a, s: op(a, [4], s, None, 1e-5), x(2, 3, 4), w(4))
call("linalg_cross", lambda op, a, b: op(a, b, dim=1), x(2, 3, 4), x(2, 3, 4))
call("take", lambda op, a, n: op(a, n), x(2, 3), i(6, 4))
call("diag_embed", plainly, x(2, 3))
call("trace", lambda op, a: op(a) + a, x(3, 3))
call("select_scatter", lambda op, a, b: op(a, b, 1, 0), x(2, 3, 4), x(2, 4))
call("bucketize.Tensor", lambda op, a: op(a, torch.tensor([0.0, 0.3])) + a, x(2, 3, 4))
call("isin.Tensor_Tensor", lambda op, a: op(a, torch.tensor([0.0, 0.3])) + a, x(2, 3, 4))
call("block_diag", lambda op, a, b: op([a, b]), x(2, 3), x(3, 2))
call("linalg_solve", lambda op, a, b: op(a @ a.mT + torch.eye(3), b), x(2, 3, 3), x(2, 3, 4))
call("linalg_inv linalg_det", lambda op, a: op(a @ a.mT + torch.eye(3)), x(2, 3, 3))
