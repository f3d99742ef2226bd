"""Sums of products: linear layers, matrix products, einsum, attention, embeddings."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import fx

from secateur.graph.rules.op import CONSUME, PRODUCE, Axes, Op
from secateur.graph.rules.registry import rule


def contract(op: Op, left: fx.Node, right: fx.Node, a: str, b: str, out: str) -> Axes:
    """A product of two tensors, summed over what `out` lacks, in einsum's letters.

    Letters that both operands have are the same units (broadcasting where a size is one). Where one
    operand is a weight, it consumes what is summed over and produces what is only its own. A sum over
    units without a weight mixes them.
    """
    axes: dict[str, Any] = {}
    for letter in dict.fromkeys(a + b):
        sides = [
            (op.axes(n)[letters.index(letter)],)
            for n, letters in ((left, a), (right, b))
            if letter in letters
        ]
        axes[letter] = op.broadcast(*sides)[0]
    weight, letters, other = (right, b, a) if op.is_weight(right) else (left, a, b)
    is_weight = op.is_weight(weight) and not (op.is_weight(left) and op.is_weight(right))
    own = [c for c in letters if c not in other and c in out]
    for letter in (c for c in axes if c not in out):
        if is_weight and letter in letters:
            op.role(op.axes(weight)[letters.index(letter)], CONSUME)
        else:
            op.mix(axes[letter])
    if is_weight:
        for letter in own:
            op.role(op.axes(weight)[letters.index(letter)], PRODUCE)
            op.produces(weight, out.index(letter))
    op.count(1, *axes.values())
    return tuple(axes[letter] for letter in out)


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


@rule("aten.addmm.default", "aten.baddbmm.default", "aten.addmv.default")
def matmul_plus(op: Op) -> Axes:
    """A matrix product added to another tensor."""
    plus, left, right = op.positional[:3]
    out = _matmul(op, left, right)
    if op.is_weight(plus):
        for axis in op.axes(plus):
            op.role(axis, PRODUCE)
    return op.broadcast(out, op.axes(plus))


def _matmul(op: Op, left: fx.Node, right: fx.Node) -> Axes:
    ranks = [len(op.axes(left)), len(op.axes(right))]
    a, b = ("mk" if ranks[0] > 1 else "k"), ("kn" if ranks[1] > 1 else "k")
    batch = "".join(chr(ord("A") + i) for i in range(max(ranks[0] - len(a), ranks[1] - len(b))))
    a = batch[len(batch) - (ranks[0] - len(a)) :] + a
    b = batch[len(batch) - (ranks[1] - len(b)) :] + b
    return contract(op, left, right, a, b, batch + ("m" if "m" in a else "") + ("n" if "n" in b else ""))


@rule("aten.einsum.default")
def einsum(op: Op) -> Axes:
    """Products by letters; two operands, without repeated letters or ellipsis."""
    equation, operands = op["equation"].replace(" ", ""), list(op["tensors"])
    inputs, arrow, out = equation.partition("->")
    letters = inputs.split(",")
    if "." in equation or len(operands) > 2 or any(len(set(s)) < len(s) for s in letters):
        raise ValueError(f"einsum {equation!r} has an ellipsis, a repeated letter or more than two operands")
    if not arrow:
        every = "".join(letters)
        out = "".join(sorted(c for c in set(every) if every.count(c) == 1))
    if len(operands) == 1:
        axes = dict(zip(letters[0], op.axes(operands[0]), strict=True))
        for letter in set(letters[0]) - set(out):
            op.mix(axes[letter])
        return tuple(axes[letter] for letter in out)
    return contract(op, operands[0], operands[1], letters[0], letters[1], out)


@rule("aten.scaled_dot_product_attention.default")
def attention(op: Op) -> Axes:
    """softmax(q k^T + mask) v, for q [..., L, E], k [..., S, E], v [..., S, F].

    Heads are batch axes. With grouped queries a head of k and v serves several of q, which go with it.
    """
    q, k, v = (op.axes(op[name]) for name in ("query", "key", "value"))
    mask = op.get("attn_mask")
    if op.get("enable_gqa", False) and len(q[-3]) != len(k[-3]):
        times = len(q[-3]) // len(k[-3])
        op.tie(q[-3], np.repeat(k[-3], times))
        op.tie(k[-3], v[-3])
        batch = (*op.broadcast(q[:-3], k[:-3], v[:-3]), q[-3])
    else:
        batch = op.broadcast(q[:-2], k[:-2], v[:-2])
    (embedding,) = op.broadcast(q[-1:], k[-1:])
    (source,) = op.broadcast(k[-2:-1], v[-2:-1])
    op.mix(embedding)
    op.mix(source)
    if mask is not None:
        op.broadcast((*batch, q[-2], source), op.axes(mask))
    op.count(1, *batch, q[-2], source, embedding)
    op.count(1, *batch, q[-2], source, v[-1])
    return (*batch, q[-2], v[-1])


@rule("aten.embedding.default")
def embedding(op: Op) -> Axes:
    """Rows of weight [entries, features]; which entries are read depends on the data, so all stay."""
    entries, features = op.axes(op["weight"])
    op.freeze(entries, "which rows are read depends on the data")
    op.role(features, PRODUCE)
    indices = op.axes(op["indices"])
    op.produces(op["weight"], len(indices))
    return (*indices, features)
