"""Operators that act on each position by itself, with broadcasting."""

from __future__ import annotations

import numpy as np

from secateur.graph.rules.op import Axes, Op, plain
from secateur.graph.rules.registry import rule


@rule("pointwise", "aten.where.ScalarOther", "aten.where.ScalarSelf", "aten.where.Scalar")
def pointwise(op: Op) -> Axes | list[Axes]:
    """Work on each position alone: arithmetic, comparisons, activations, where, clamp and the like."""
    return op.for_each_output(op.broadcast(*(op.axes(n) for n in op.tensors())))


@rule(
    "aten.dropout.default", "aten.dropout_.default", "aten.feature_dropout.default",
    "aten.feature_dropout_.default", "aten.alpha_dropout.default", "aten.alpha_dropout_.default",
    "aten.feature_alpha_dropout.default", "aten.native_dropout.default",
    "aten.clone.default", "aten.contiguous.default", "aten.detach.default", "aten.detach_.default",
    "aten.alias.default", "aten.lift_fresh_copy.default", "aten.positive.default",
    "aten.to.dtype", "aten.to.device", "aten.to.dtype_layout", "aten.to.other", "aten._to_copy.default",
    "aten.type_as.default", "aten.nan_to_num.default",
    "aten.real.default", "aten.imag.default", "aten._conj.default", "aten.conj.default",
    "aten.resolve_conj.default", "aten.resolve_neg.default",
    "aten.bernoulli.default", "aten.bernoulli_.float", "aten.rand_like.default", "aten.randn_like.default",
    "aten.rand_like.generator", "aten.randn_like.generator", "aten.randint_like.default",
    "aten.randint_like.low_dtype", "aten.randint_like.generator", "aten.randint_like.low_generator_dtype",
    "aten.normal_.default", "aten.uniform_.default", "aten.exponential_.default", "aten.cauchy_.default",
    "aten.poisson.default",
    "aten.log_normal_.default", "aten.geometric_.default", "aten.random_.default", "aten.random_.to",
    "aten.zeros_like.default", "aten.ones_like.default", "aten.full_like.default", "aten.empty_like.default",
     "aten.fill.Scalar", "aten.fill.Tensor", "aten.fill_.Scalar", "aten.fill_.Tensor", "aten.zero_.default",
)  # fmt: skip
def same_shape(op: Op) -> Axes | list[Axes]:
    """Give the output the labels of the first argument. Other tensors broadcast against it."""
    first = op.axes(op.tensors()[0])
    if op.name.startswith(("aten.to.other", "aten.type_as")):
        return first
    if op.name == "aten.native_dropout.default":
        return [first, first]  # the second is the mask
    return op.broadcast(first, *(op.axes(n) for n in op.tensors()[1:]))


@rule(
    "aten.copy_.default", "aten.copy.default", "aten.normal.Tensor_float", "aten.normal.float_Tensor",
    "aten.normal.Tensor_Tensor",
)  # fmt: skip
def copy(op: Op) -> Axes:
    """Write one tensor into another, or draw around it. Both hold the same units."""
    return op.broadcast(*(op.axes(n) for n in op.tensors()))


@rule("aten.view_as_real.default", "aten.view_as_complex.default")
def complex_view(op: Op) -> Axes:
    """View pairs of real numbers along a last axis of size 2 as complex numbers, or the reverse."""
    x = op.axes(op["self"])
    if op.name.startswith("aten.view_as_real"):
        return (*x, plain(2))
    op.freeze(x[-1], "two numbers that make one")
    return x[:-1]


@rule("aten.tril.default", "aten.triu.default", "aten.tril_.default", "aten.triu_.default")
def triangle(op: Op) -> Axes:
    """Write zeros on one side of a diagonal. It is found by counting, so the last two axes are frozen."""
    x = op.axes(op["self"])
    for axis in x[-2:]:
        op.freeze(axis, "counted from a diagonal")
    return x


@rule("aten.one_hot.default")
def one_hot(op: Op) -> Axes:
    """Add a last axis with one position for each class. All classes stay."""
    return (*op.axes(op["self"]), plain(op.output_shape[-1]))


@rule("aten.prelu.default")
def prelu(op: Op) -> Axes:
    """Apply a slope for each channel, which lies along axis 1, or one slope for all."""
    x = op.axes(op["self"])
    slope = op.axes(op["weight"])
    if slope and len(slope[0]) > 1:
        op.tie(slope[0], x[1] if len(x) > 1 else x[0])
    return x


@rule("aten.glu.default")
def glu(op: Op) -> Axes:
    """Let one half of an axis gate the other. Each position of one half is one unit with its gate."""
    x = list(op.axes(op["self"]))
    dim = op.integer("dim") % len(x)
    first, second = np.split(x[dim], 2)
    op.tie(first, second)
    x[dim] = first
    return tuple(x)


@rule(
    "aten.zeros.default", "aten.ones.default", "aten.full.default", "aten.empty.memory_format",
    "aten.new_zeros.default", "aten.new_ones.default", "aten.new_full.default", "aten.new_empty.default",
    "aten.rand.default", "aten.rand.generator", "aten.randn.default", "aten.randn.generator",
    "aten.randint.default", "aten.randint.generator", "aten.randint.low", "aten.randint.low_generator",
    "aten.normal.float_float",
)  # fmt: skip
def filled(op: Op) -> Axes:
    """Make a tensor of one value, or of noise. Its free labels follow whatever it is combined with."""
    return tuple(op.store.fresh(n) if n > 1 else np.zeros(n, dtype=np.int64) for n in op.output_shape)


@rule(
    "aten.arange.default",
    "aten.arange.start",
    "aten.arange.start_step",
    "aten.linspace.default",
    "aten.eye.m",
    "aten.randperm.default",
    "aten.randperm.generator",
)
@rule(
    "aten.eye.default", "aten.scalar_tensor.default", "aten.tril_indices.default", "aten.triu_indices.default"
)
def counted(op: Op) -> Axes:
    """Make a tensor whose values depend on the position, such as 0, 1, 2. Its axes are frozen."""
    because = op.walk.reasons.label(op.reason)
    return tuple(np.full(n, because, dtype=np.int64) for n in op.output_shape)
