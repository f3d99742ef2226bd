"""Sums of products."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc
from secateur.graph.rules.op import COMPUTED
from tests.graph.tiny import Calls, identities, reasons, traced


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) * 0.4)


def test_linear_of_any_rank() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 2))
    graph = traced(net, torch.randn(2, 6, 7, 3))
    assert identities(graph, ("0.weight", 0, 4), ("0.bias", 0, 4), ("2.weight", 1, 4)) == [[0, 1, 2, 3]] * 3
    assert identities(graph, ("2.weight", 0, 5), ("4.weight", 1, 5)) == [[0, 1, 2, 3, 4]] * 2
    assert reasons(graph) == {"model input input", "model output"}


@pytest.mark.parametrize(
    ("shape", "function"),
    [
        ((4, 5), lambda m, x: m.b(F.relu(m.a(x)) @ m.w)),
        ((5, 4), lambda m, x: m.b(F.relu(m.a(x)) @ m.w.t())),
        ((4, 5), lambda m, x: m.b(torch.mm(F.relu(m.a(x)), m.w))),
        ((4, 5), lambda m, x: m.b(torch.addmm(m.c, F.relu(m.a(x)), m.w))),
        ((5, 4), lambda m, x: m.b((m.w @ F.relu(m.a(x)).t()).t())),
        ((4, 5), lambda m, x: m.b(torch.einsum("bi,io->bo", F.relu(m.a(x)), m.w))),
        ((5, 4), lambda m, x: m.b(torch.einsum("oi,bi->bo", m.w, F.relu(m.a(x))))),
        ((5, 4), lambda m, x: m.b(torch.stack([m.w @ row for row in F.relu(m.a(x)).unbind(0)]))),
        ((1, 4, 5), lambda m, x: m.b(torch.bmm(F.relu(m.a(x))[None], m.w)[0])),
        ((1, 4, 5), lambda m, x: m.b(torch.baddbmm(m.c, F.relu(m.a(x))[None], m.w)[0])),
    ],
    ids="matmul transposed mm addmm left einsum einsum_left mv bmm baddbmm".split(),
)
def test_products_with_a_weight(shape: tuple[int, ...], function: object) -> None:
    net = Calls(function, a=nn.Linear(3, 4), w=weight(*shape), c=weight(5), b=nn.Linear(5, 2))
    graph = traced(net, torch.randn(6, 3))
    consumed, produced = shape.index(4), shape.index(5)
    assert identities(graph, ("a.weight", 0, 4), ("w", consumed, 4)) == [[0, 1, 2, 3]] * 2
    assert identities(graph, ("w", produced, 5), ("b.weight", 1, 5)) == [[0, 1, 2, 3, 4]] * 2
    assert {s.role for s in graph["a"].slices if s.tensor == "w"} == {"consume"}
    assert "produce" in {s.role for s in graph["w"].slices if s.tensor == "w"}


def test_a_product_of_activations_mixes_what_it_sums_over() -> None:
    """In q k^T the head size is summed over without weights; the rows are not."""

    def attend(m: nn.Module, x: Tensor) -> Tensor:
        scores = m.q(x) @ m.k(x).mT
        return m.out(F.relu(m.v(scores.sigmoid() @ x)))

    net = Calls(attend, q=nn.Linear(3, 4), k=nn.Linear(3, 4), v=nn.Linear(3, 6), out=nn.Linear(6, 2))
    graph = traced(net, torch.randn(2, 5, 3))
    assert [(g.name, g.size) for g in graph.groups] == [("v", 6)]
    assert [(left.group.name, left.group.size) for left in graph.left] == [("q", 4)]
    assert "aten.matmul.default" in graph.left[0].reason
    inexact = traced(net, torch.randn(2, 5, 3), allow_inexact=True)
    assert identities(inexact, ("q.weight", 0, 4), ("k.weight", 0, 4)) == [[0, 1, 2, 3]] * 2


def test_tied_weights_are_one_tensor_under_its_first_name() -> None:
    shared = nn.Linear(4, 4)
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), shared, nn.ReLU(), nn.Linear(4, 2))
    net.insert(3, nn.Linear(4, 4))
    net[3].weight = shared.weight
    graph = traced(net, torch.randn(2, 3))
    assert [(g.name, g.size) for g in graph.groups] == [("0", 4)]
    touched = {(s.tensor, s.axis, s.role) for s in graph["0"].slices}
    assert {("2.weight", 0, "consume"), ("2.weight", 1, "consume")}.isdisjoint(
        {t for t in touched if t[0] == "3.weight"}
    )
    assert {t for t in touched if t[0] == "2.weight"} == {
        ("2.weight", 0, "produce"),
        ("2.weight", 1, "consume"),
    }
    assert {("2.bias", 0, "produce"), ("3.bias", 0, "produce")} <= touched


def test_an_encoder_that_decodes_with_its_own_weight() -> None:
    net = Calls(lambda m, x: F.linear(F.relu(m.a(x)), m.a.weight.t()), a=nn.Linear(3, 5))
    graph = traced(net, torch.randn(2, 3))
    roles = [(s.axis, s.role, s.position.tolist()) for s in graph["a"].slices if s.tensor == "a.weight"]
    assert roles == [(0, "produce", [0, 1, 2, 3, 4]), (0, "consume", [0, 1, 2, 3, 4])]


def test_embedding_keeps_its_rows() -> None:
    net = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 2))
    graph = traced(net, torch.randint(7, (2, 5)))
    assert identities(graph, ("0.weight", 1, 4), ("1.weight", 1, 4)) == [[0, 1, 2, 3]] * 2
    assert identities(graph, ("0.weight", 0, 7)) == [[-1] * 7]
    assert "aten.embedding.default: which rows are read depends on the data" in reasons(graph)


def test_a_constant_made_in_forward_keeps_what_it_reads() -> None:
    """No copy of the model could mask it, so the proof would have no reference."""
    net = Calls(
        lambda m, x: m.c(F.relu(m.b(m.a(x)) @ torch.tensor([[1.0, 2.0, 3.0]] * 4, dtype=x.dtype))),
        a=nn.Linear(3, 5), b=nn.Linear(5, 4), c=nn.Linear(3, 2),
    )  # fmt: skip
    graph = traced(net, torch.randn(2, 3))
    assert "read by a tensor that is neither a parameter nor a buffer" in reasons(graph)
    assert identities(graph, ("a.weight", 0, 5), ("b.weight", 0, 4)) == [[0, 1, 2, 3, 4], [-1] * 4]


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_attention_loses_whole_heads(kv_heads: int) -> None:
    """Four query heads of size 2; with two heads of k and v, each serves two query heads."""

    def attend(m: nn.Module, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, 2)).transpose(1, 2) for layer in (m.q, m.k, m.v))
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=kv_heads != 4)
        return m.out(y.transpose(1, 2).flatten(2))

    net = Calls(
        attend,
        q=nn.Linear(3, 8),
        k=nn.Linear(3, 2 * kv_heads),
        v=nn.Linear(3, 2 * kv_heads),
        out=nn.Linear(8, 5),
    )
    graph = traced(net, torch.randn(2, 5, 3))
    heads = [0, 0, 1, 1, 2, 2, 3, 3] if kv_heads == 4 else [0, 0, 0, 0, 1, 1, 1, 1]
    shared = [0, 0, 1, 1] if kv_heads == 2 else heads
    axes = [
        ("q.weight", 0, 8),
        ("k.weight", 0, 2 * kv_heads),
        ("v.weight", 0, 2 * kv_heads),
        ("out.weight", 1, 8),
    ]
    assert identities(graph, *axes) == [heads, shared, shared, heads]


def test_einsum_of_three_operands_and_an_ellipsis() -> None:
    def gated(m: nn.Module, x: Tensor) -> Tensor:
        y = torch.relu(m.a(x))
        return m.b(torch.einsum("...i,io,...i->...o", y, m.w, torch.sigmoid(y)))

    net = Calls(gated, a=nn.Linear(3, 4), w=weight(4, 5), b=nn.Linear(5, 2))
    graph = traced(net, torch.randn(2, 6, 3))
    assert identities(graph, ("a.weight", 0, 4), ("w", 0, 4)) == [[0, 1, 2, 3]] * 2
    assert identities(graph, ("w", 1, 5), ("b.weight", 1, 5)) == [[0, 1, 2, 3, 4]] * 2


def test_einsum_counts_products_pair_by_pair() -> None:
    net = Calls(
        lambda m, x: torch.einsum("bi,ij,jk->bk", m.a(x), m.v, m.w),
        a=nn.Linear(3, 4),
        v=weight(4, 5),
        w=weight(5, 2),
    )
    assert traced(net, torch.randn(2, 3)).cost().macs == 3 * 4 + 4 * 5 + 5 * 2


@pytest.mark.parametrize(
    "computed",
    [
        lambda m: m.v + m.w,
        lambda m: m.v * m.scale,
        lambda m: m.scale * m.v,
        lambda m: m.w + m.low @ m.high,
        lambda m: torch.cat([m.v, m.w]),
        lambda m: F.normalize(m.v, dim=0),
    ],
    ids="sum scaled scale_first low_rank joined normalised".split(),
)
def test_weights_computed_from_parameters(computed: Callable[[nn.Module], Tensor]) -> None:
    """`traced` compares with the masked model: every parameter that the weight comes from is masked."""
    net = Calls(
        lambda m, x: F.linear(torch.relu(m.a(x)), computed(m)),
        a=nn.Linear(3, 6), v=weight(5, 6), w=weight(5, 6), scale=weight(6), low=weight(5, 2),
        high=weight(2, 6),
    )  # fmt: skip
    assert [group.name for group in traced(net, torch.randn(2, 3)).groups] == ["a"]


def test_heads_of_a_weight_that_is_viewed() -> None:
    def viewed(m: nn.Module, x: Tensor) -> Tensor:
        return torch.einsum("bhe,hed->bd", torch.relu(m.a(x)).view(-1, 3, 2), m.w.view(3, 2, 4))

    graph = traced(Calls(viewed, a=nn.Linear(3, 6), w=weight(6, 4)), torch.randn(2, 3))
    assert identities(graph, ("a.weight", 0, 6), ("w", 0, 6)) == [[0, 0, 1, 1, 2, 2]] * 2


@pytest.mark.parametrize("computed", [torch.exp, lambda w: w + 1, lambda w: w.softmax(0)])
def test_a_weight_that_zeros_do_not_make_zero_is_inexact(computed: Callable[[Tensor], Tensor]) -> None:
    net = Calls(
        lambda m, x: m.b(F.linear(torch.relu(m.a(x)), computed(m.w))),
        a=nn.Linear(3, 6), w=weight(5, 6), b=nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2)),
    )  # fmt: skip
    graph = traced(net, torch.randn(2, 3))
    assert "a" not in [group.name for group in graph.groups]
    (left,) = (left for left in graph.left if left.group.name == "a")
    assert COMPUTED in left.reason


def test_a_model_that_only_has_such_weights_is_told_to_store_them() -> None:
    """In words that name what forward does, and what to do."""
    net = Calls(lambda m, x: F.linear(torch.relu(m.a(x)), m.w + 1), a=nn.Linear(3, 6), w=weight(5, 6))
    with pytest.raises(sc.NothingToPruneError) as refused:
        traced(net, torch.randn(2, 3))
    said = str(refused.value)
    assert "forward computes its weight" in said
    assert "Make that weight a parameter, or pass allow_inexact=True" in said
    assert len(said) <= 600
