"""Matrix products: linear layers, and products of activations."""

from __future__ import annotations

from torch import fx

from secateur.graph.rules.op import CONSUME, PRODUCE, Axes, Op
from secateur.graph.rules.registry import rule


@rule("aten.linear.default")
def linear(op: Op) -> Axes:
    """x [..., in] times weight [out, in] transposed, plus bias [out]."""
    x, weight, bias = op["input"], op["weight"], op.get("bias")
    x_axes = op.axes(x)
    out, into = op.axes(weight)
    op.tie(x_axes[-1], into)
    op.role(out, PRODUCE)
    op.role(into, CONSUME)
    if bias is not None:
        op.tie(op.axes(bias)[0], out)
        op.role(op.axes(bias)[0], PRODUCE)
    op.produces(weight, len(x_axes) - 1)
    op.count(1, *x_axes[:-1], out, into)
    return (*x_axes[:-1], out)


@rule("aten.matmul.default", "aten.mm.default", "aten.bmm.default", "aten.mv.default", "aten.dot.default")
def matmul(op: Op) -> Axes:
    """a [..., m, k] times b [..., k, n], with vectors and broadcast batch axes as in `torch.matmul`."""
    left, right = op.positional[:2]
    return _matmul(op, left, right)


@rule("aten.addmm.default", "aten.baddbmm.default", "aten.addbmm.default", "aten.addmv.default")
def matmul_plus(op: Op) -> Axes:
    """A matrix product added to another tensor."""
    plus, left, right = op.positional[:3]
    out = _matmul(op, left, right)
    if op.is_weight(plus):
        for axis in op.axes(plus):
            op.role(axis, PRODUCE)
    return op.broadcast(out, op.axes(plus))


def _matmul(op: Op, left: fx.Node, right: fx.Node) -> Axes:
    a, b = op.axes(left), op.axes(right)
    a_matrix, b_matrix = len(a) > 1, len(b) > 1
    contracted_a, contracted_b = a[-1], b[-2] if b_matrix else b[-1]
    rows = a[-2:-1] if a_matrix else ()
    columns = b[-1:] if b_matrix else ()
    batch = op.broadcast(a[:-2], b[:-2])
    op.tie(contracted_a, contracted_b)
    if op.is_weight(right) and columns:
        op.role(columns[0], PRODUCE)
        op.role(contracted_b, CONSUME)
        op.produces(right, len(batch) + len(rows))
    elif op.is_weight(left) and rows:
        op.role(rows[0], PRODUCE)
        op.role(contracted_a, CONSUME)
        op.produces(left, len(batch))
    else:
        op.mix(contracted_a)
    op.count(1, *batch, *rows, *columns, contracted_a)
    return (*batch, *rows, *columns)


@rule("aten.embedding.default")
def embedding(op: Op) -> Axes:
    """Rows of weight [entries, features]; which entries are read depends on the data, so all stay."""
    entries, features = op.axes(op["weight"])
    op.freeze(entries, "which rows are read depends on the data")
    op.role(features, PRODUCE)
    indices = op.axes(op["indices"])
    op.produces(op["weight"], len(indices))
    return (*indices, features)
