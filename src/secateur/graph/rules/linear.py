"""Rules for sums of products: linear layers, matrix products, einsum, attention, embeddings."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import fx

from secateur.graph.labels import Labels
from secateur.graph.rules.op import PRODUCE, Axes, Op, plain
from secateur.graph.rules.registry import rule


def contract(op: Op, operands: Sequence[fx.Node], terms: Sequence[str], out: str) -> Axes:
    """Multiply tensors and sum over axes, as einsum does.

    Axes with the same letter are tied, except where one of them has size 1 and broadcasts. An operand that is
    a weight consumes the units of the axes that are summed over, and produces those of the axes that it alone
    has. A sum that no weight takes part in, or weights alone, mixes its positions.

    Args:
        op: The call.
        operands: The tensors that are multiplied.
        terms: For each operand, a letter for each of its axes.
        out: The letters of the result. All others are summed over.

    Returns:
        The labels of the result.
    """
    axes: dict[str, Labels] = {}
    for letter in dict.fromkeys("".join(terms)):
        sides = [
            (op.axes(operand)[term.index(letter)],)
            for operand, term in zip(operands, terms, strict=True)
            if letter in term
        ]
        axes[letter] = op.broadcast(*sides)[0]
    weights = op.operand_weights(operands)
    for letter in (c for c in axes if c not in out):
        consuming = [
            k
            for k in weights
            if letter in terms[k] and len(op.axes(operands[k])[terms[k].index(letter)]) == len(axes[letter])
        ]
        if not consuming and len(operands) == 2 and not weights and all(letter in term for term in terms):
            op.match(axes[letter], operands)
        elif not consuming:
            op.mix(axes[letter])
        for k in consuming:
            op.consumes(operands[k], op.axes(operands[k])[terms[k].index(letter)])
    for k in weights:
        others = "".join(term for i, term in enumerate(terms) if i != k)
        for letter in (c for c in terms[k] if c not in others and c in out):
            op.role(op.axes(operands[k])[terms[k].index(letter)], PRODUCE)
            op.produces(operands[k], out.index(letter))
    _count(op, operands, terms, out, axes)
    return tuple(axes[letter] for letter in out)


def _count(
    op: Op, operands: Sequence[fx.Node], terms: Sequence[str], out: str, axes: dict[str, Labels]
) -> None:
    """Count MACs from left to right. Each product is summed over the letters that nothing behind it has."""
    left = terms[0]
    for k in range(1, len(operands)):
        rest = "".join(terms[k + 1 :]) + out
        letters = dict.fromkeys(left + terms[k])
        op.count(1, *(axes[c] for c in letters))
        left = "".join(c for c in letters if c in rest)


@rule("aten.linear.default")
def linear(op: Op) -> Axes:
    """Multiply x [..., in] by the transpose of weight [out, in], and add bias [out]."""
    x, weight, bias = op["input"], op["weight"], op.get("bias")
    x_axes = op.axes(x)
    out, into = op.axes(weight)
    op.tie(x_axes[-1], into)
    op.role(out, PRODUCE)
    op.consumes(weight, into)
    if bias is not None:
        op.tie(op.axes(bias)[0], out)
        op.role(op.axes(bias)[0], PRODUCE)
    op.produces(weight, len(x_axes) - 1)
    op.count(1, *x_axes[:-1], out, into)
    return (*x_axes[:-1], out)


@rule("aten.matmul.default", "aten.mm.default", "aten.bmm.default", "aten.mv.default", "aten.dot.default")
def matmul(op: Op) -> Axes:
    """Multiply a [..., m, k] by b [..., k, n], or vectors. Batch axes broadcast, as in `torch.matmul`."""
    left, right = op.positional[:2]
    return _matmul(op, left, right)


@rule("aten.addmm.default", "aten.baddbmm.default", "aten.addmv.default")
def matmul_plus(op: Op) -> Axes:
    """Add a matrix product to another tensor."""
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
    return contract(op, (left, right), (a, b), batch + ("m" if "m" in a else "") + ("n" if "n" in b else ""))


@rule("aten._grouped_mm.default", "transformers.grouped_mm_fallback.default")
def grouped_matmul(op: Op) -> Axes:
    """Multiply each row of [rows, in] by one of the matrices in weight [matrices, in, out].

    The data decide which matrix that is, so all matrices stay. A unit is the same position of an axis in all
    of them.
    """
    x, weight = op.positional[:2]
    plain_call = len(op.axes(x)) == 2 and len(op.axes(weight)) == 3 and op.get("bias") is None
    if not op.is_weight(weight) or not plain_call:
        raise ValueError("expected rows and a weight of several matrices")
    rows, into = op.axes(x)
    matrices, own, out = op.axes(weight)
    for axis in (matrices, rows):
        op.freeze(axis, "which matrix a row meets depends on the data")
    op.tie(into, own)
    op.consumes(weight, own)
    op.role(out, PRODUCE)
    op.produces(weight, 1)
    op.count(1, rows, into, out)
    return rows, out


@rule("aten.bilinear.default")
def bilinear(op: Op) -> Axes:
    """Multiply x1 [..., left] and x2 [..., right] by weight [out, left, right], and add bias [out]."""
    x1, x2, weight = (op[name] for name in ("input1", "input2", "weight"))
    bias = op.get("bias")
    rest = "".join(chr(ord("A") + i) for i in range(len(op.axes(x1)) - 1))
    axes = contract(op, (x1, x2, weight), (rest + "l", rest + "r", "olr"), rest + "o")
    if bias is not None:
        op.tie(op.axes(bias)[0], axes[-1])
        op.role(op.axes(bias)[0], PRODUCE)
    return axes


@rule("aten.outer.default", "aten.ger.default")
def outer(op: Op) -> Axes:
    """Multiply each entry of one vector by each entry of another."""
    return contract(op, op.positional[:2], ("i", "j"), "ij")


@rule("aten.tensordot.default")
def tensordot(op: Op) -> Axes:
    """Multiply two tensors and sum over pairs of their axes."""
    terms = [
        [chr(0x100 + 64 * i + k) for k in range(len(op.axes(x)))] for i, x in enumerate(op.positional[:2])
    ]
    pairs = list(zip(op.integers(op["dims_self"]), op.integers(op["dims_other"]), strict=True))
    summed = {terms[0][a] for a, _ in pairs}
    for a, b in pairs:
        terms[1][b] = terms[0][a]
    out = "".join(c for term in terms for c in term if c not in summed)
    return contract(op, op.positional[:2], ["".join(t) for t in terms], out)


@rule("aten.cdist.default", "aten._cdist_forward.default")
def distances(op: Op) -> Axes:
    """Compute distances [..., P, R] between vectors [..., P, M] and [..., R, M]. Features are mixed."""
    a, b = op.axes(op["x1"]), op.axes(op["x2"])
    (features,) = op.broadcast(a[-1:], b[-1:])
    op.mix(features)
    return (*op.broadcast(a[:-2], b[:-2]), a[-2], b[-2])


@rule("aten.einsum.default")
def einsum(op: Op) -> Axes:
    """Multiply any number of tensors as an equation says. An ellipsis stands for letters of its own."""
    operands = list(op["tensors"])
    terms, out = _letters(op["equation"], [len(op.axes(x)) for x in operands])
    if any(len(set(term)) < len(term) for term in (*terms, out)):
        raise ValueError(f"einsum {op['equation']!r} repeats a letter within one operand")
    if len(operands) > 1:
        return contract(op, operands, terms, out)
    axes = dict(zip(terms[0], op.axes(operands[0]), strict=True))
    for letter in set(terms[0]) - set(out):
        op.mix(axes[letter])
    return tuple(axes[letter] for letter in out)


def _letters(equation: str, ranks: list[int]) -> tuple[list[str], str]:
    """Return the letters of each operand and of the result, with letters in place of the ellipsis."""
    inputs, arrow, out = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if not arrow:
        every = inputs.replace(",", "").replace(".", "")
        out = ("..." if "..." in inputs else "") + "".join(
            sorted(c for c in set(every) if every.count(c) == 1)
        )
    hidden = [rank - len(t) + 3 if "..." in t else 0 for t, rank in zip(terms, ranks, strict=True)]
    spare = "".join(chr(0x100 + i) for i in range(max(hidden)))  # no letters that an equation can hold
    terms = [t.replace("...", spare[len(spare) - n :]) for t, n in zip(terms, hidden, strict=True)]
    return terms, out.replace("...", spare)


@rule("aten.scaled_dot_product_attention.default")
def attention(op: Op) -> Axes:
    """Compute softmax(q k^T + mask) v, for q [..., L, E], k [..., S, E] and v [..., S, F].

    Heads are batch axes. With grouped queries, one head of k and v serves several heads of q: they are one
    unit.
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
    op.match(embedding, (op["query"], op["key"]))
    if op.walk.head_sizes:
        op.walk.dimensions.append(v[-1])
    op.mix(source)
    if op.get("is_causal", False):
        for axis in (q[-2], source):
            op.freeze(axis, "in order of time")
    if mask is not None:
        op.broadcast((*batch, q[-2], source), op.axes(mask))
    op.count(1, *batch, q[-2], source, embedding)
    op.count(1, *batch, q[-2], source, v[-1])
    return (*batch, q[-2], v[-1])


@rule("aten.embedding_bag.default", "aten.embedding_bag.padding_idx")
def embedding_bag(op: Op) -> list[Axes]:
    """Read rows of weight [entries, features], and take their sum, mean or maximum within each bag."""
    entries, features = op.axes(op["weight"])
    op.freeze(entries, "which rows are read depends on the data")
    for name in ("indices", "offsets", "per_sample_weights"):
        if op.get(name) is not None:
            op.freeze(op.axes(op[name])[0], "which rows are in a bag depends on the data")
    op.role(features, PRODUCE)
    op.produces(op["weight"], 1)
    bags, *counts = (op.shape(value) for value in op.node.meta["val"])
    return [
        (plain(bags[0]), features),
        *(tuple(map(plain, shape[:1])) + (features,) * (len(shape) - 1) for shape in counts),
    ]


@rule("aten.embedding.default")
def embedding(op: Op) -> Axes:
    """Read rows of weight [entries, features]. The data decide which ones, so all entries stay."""
    entries, features = op.axes(op["weight"])
    op.freeze(entries, "which rows are read depends on the data")
    op.role(features, PRODUCE)
    indices = op.axes(op["indices"])
    op.produces(op["weight"], len(indices))
    return (*indices, features)
