"""Products with a weight that the data choose: a matrix for each token, experts."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc
from tests.graph.test_linear import weight
from tests.graph.tiny import Calls, identities, reasons, traced
from tests.targets.units.plans import random_plan

CHOICES = 3


def chosen(x: Tensor) -> Tensor:
    """Which matrix each row of x meets. [rows]"""
    return (x[:, :CHOICES].argmax(1)).to(torch.int64)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: m.b(torch.bmm(m.w[chosen(x)], F.relu(m.a(x))[..., None])[..., 0]),
        lambda m, x: m.b(torch.bmm(F.relu(m.a(x))[:, None], m.w[chosen(x)].mT)[:, 0]),
        lambda m, x: m.b(torch.einsum("bi,boi->bo", F.relu(m.a(x)), m.w.index_select(0, chosen(x)))),
        lambda m, x: m.b((F.relu(m.a(x))[:, None] @ m.w.transpose(1, 2)[chosen(x)])[:, 0]),
        lambda m, x: m.b((F.relu(m.a(x))[:, None] @ m.w[chosen(x)].abs().clone().mT)[:, 0] + m.c[chosen(x)]),
    ],
    ids="bmm transposed einsum viewed_before cast_and_bias".split(),
)  # fmt: skip
def test_a_matrix_for_each_row(function: object) -> None:
    net = Calls(function, a=nn.Linear(3, 4), w=weight(CHOICES, 5, 4), c=weight(CHOICES, 5), b=nn.Linear(5, 2))
    graph = traced(net, torch.randn(6, 3))
    assert identities(graph, ("w", 0, CHOICES)) == [[-1] * CHOICES]
    assert identities(graph, ("a.weight", 0, 4), ("w", 2, 4)) == [[0, 1, 2, 3]] * 2
    assert identities(graph, ("w", 1, 5), ("b.weight", 1, 5)) == [[0, 1, 2, 3, 4]] * 2
    assert {s.role for s in graph["a"].slices if s.tensor == "w"} == {"consume"}
    assert {s.role for s in graph["w"].slices if s.tensor == "w"} == {"produce"}
    assert graph["a"].exact
    assert graph["w"].exact
    assert any("which positions are read depends on an index tensor" in reason for reason in reasons(graph))


def test_two_chosen_weights_mix_what_they_are_summed_over() -> None:
    """Entries of two tables, matched by a sum over their features: no weight reads them."""

    def match(m: nn.Module, x: Tensor) -> Tensor:
        rows = torch.einsum("bi,bi->b", m.u[chosen(x)], m.v[chosen(-x)])
        return m.b(F.relu(m.a(x)) * rows[:, None])

    net = Calls(match, a=nn.Linear(3, 4), u=weight(CHOICES, 6), v=weight(CHOICES, 6), b=nn.Linear(4, 2))
    graph = traced(net, torch.randn(6, 3))
    assert [group.name for group in graph.groups] == ["a"]


def test_a_weight_itself_comes_before_a_part_of_one() -> None:
    """Rows of a table times a matrix: the matrix is the weight, the rows are what it reads."""

    def look(m: nn.Module, x: Tensor) -> Tensor:
        return m.b(F.relu(m.table[chosen(x)] @ m.w))

    net = Calls(look, table=weight(CHOICES, 4), w=weight(4, 5), b=nn.Linear(5, 2))
    graph = traced(net, torch.randn(6, 3))
    assert identities(graph, ("w", 1, 5), ("b.weight", 1, 5)) == [[0, 1, 2, 3, 4]] * 2
    assert {s.role for s in graph["w"].slices if s.tensor == "w"} == {"produce"}


@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_products(transposed: bool) -> None:
    """One kernel for rows sorted by the matrix that they meet; it takes bfloat16 alone under capture."""
    if not hasattr(F, "grouped_mm"):
        pytest.skip("needs torch.nn.functional.grouped_mm")

    def grouped(m: nn.Module, x: Tensor) -> Tensor:
        first, order = chosen(x).sort()
        counts = (first[:, None] == torch.arange(CHOICES)).sum(0)
        offsets = counts.cumsum(0).to(torch.int32)
        w = m.w.mT if transposed else m.w
        return m.b(F.grouped_mm(F.relu(m.a(x))[order], w, offs=offsets))

    shape = (CHOICES, 16, 8) if transposed else (CHOICES, 8, 16)
    net = Calls(grouped, a=nn.Linear(3, 8), w=weight(*shape), b=nn.Linear(16, 2)).bfloat16()
    x = torch.randn(6, 3).bfloat16()
    graph = sc.trace(net, x)
    keep = {group.name: np.arange(group.size) % 16 < 8 for group in graph.groups if group.size > 8}
    plan = sc.Plan.build(graph, keep, allocator="test")
    assert sc.verify(net, sc.apply(net, plan, "graph", graph=graph), plan, x).difference < 1e-12
    assert identities(graph, ("w", 0, CHOICES)) == [[-1] * CHOICES]
    into, out = (2, 1) if transposed else (1, 2)
    assert identities(graph, ("a.weight", 0, 8), ("w", into, 8)) == [list(range(8))] * 2
    assert identities(graph, ("w", out, 16), ("b.weight", 1, 16)) == [list(range(16))] * 2
    assert any("which matrix a row meets depends on the data" in reason for reason in reasons(graph))


MADE: dict[str, Callable[[Tensor], Tensor]] = {
    "difference": lambda w: w - w.t(),
    "sum": lambda w: (w + w.mT) / 2,
    "three": lambda w: w + w.t() + w.abs(),
    "product": lambda w: w @ w.t(),
    "by entry": lambda w: w * w.t(),
    "beside": lambda w: torch.cat([w, w.t()], 1),
}


@pytest.mark.parametrize("made", MADE)
def test_a_weight_that_reads_a_parameter_along_both_axes(made: str) -> None:
    """Units are along both axes of a square parameter, and both read where its transpose is added."""

    def run(m: nn.Module, x: Tensor) -> Tensor:
        h = F.relu(m.a(x)) @ MADE[made](m.w)
        return m.b(h if h.shape[-1] == m.b.in_features else h[..., : m.b.in_features])

    torch.manual_seed(0)
    net = Calls(run, a=nn.Linear(3, 8), w=weight(8, 8), b=nn.Linear(8, 2)).double().eval()
    x = torch.randn(6, 3).double()
    graph = sc.trace(net, x)
    assert "a" in [group.name for group in graph.groups]
    plan = random_plan(graph, 0.4)
    small, masked = sc.apply(net, plan, graph=graph), sc.apply(net, plan, "masked")
    assert sc.verify(net, small, plan, x).proven
    torch.testing.assert_close(small(x), masked(x))
