"""Operators without a rule become others, and what cannot be replaced stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import secateur as sc
from secateur.graph.rules import operator_name


class Between(nn.Module):
    def __init__(self, body: Callable[[Tensor], Tensor], width: int = 12) -> None:
        super().__init__()
        self.up, self.body, self.down = nn.Linear(6, 12), body, nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, length, 6] to [batch, length, 3]."""
        return self.down(self.body(self.up(x).relu()))


def names(graph: sc.Graph) -> set[str]:
    return {operator_name(node) for node in graph.program.graph.nodes}


@pytest.mark.parametrize(
    ("body", "width"),
    [
        (lambda h: h.absolute() * h.less(0.5), 12),
        (lambda h: torch.msort(h.transpose(0, 1)).transpose(0, 1), 12),
        (lambda h: torch.column_stack([h.flatten(0, 1), h.flatten(0, 1)]).view(*h.shape[:2], 24), 24),
        (lambda h: torch.cumulative_trapezoid(h, dim=1), 12),
        (lambda h: torch.inner(h.mT, h.new_ones(5, h.shape[1])).moveaxis(1, 2), 12),
        (lambda h: h + F.smooth_l1_loss(h, 2 * h, reduction="none"), 12),
    ],
)
def test_they_hold_at_other_sizes_in_every_form(body: Callable[[Tensor], Tensor], width: int) -> None:
    torch.manual_seed(0)
    model = Between(body, width).double().eval()
    graph = sc.trace(model, torch.randn(2, 5, 6).double())
    plan = sc.Uniform(ratio=0.5).allocate(graph, sc.score(graph, None, "magnitude"))
    assert sum(group.size for group in graph.groups) == 12
    dense = sc.apply(model, plan, graph=graph, form="masked")
    for form in ("module", "graph"):
        small = sc.apply(model, plan, graph=graph, form=form)
        assert sc.verify(model, small, plan).proven
        for batch, length in ((2, 5), (3, 7)):
            x = torch.randn(batch, length, 6).double()
            torch.testing.assert_close(small(x), dense(x), rtol=1e-9, atol=1e-9)


def test_an_operator_of_which_a_part_has_no_rule_stays() -> None:
    def body(h: Tensor) -> Tensor:
        wave = torch.stft(h.mT.flatten(0, 1).repeat(1, 4), 4, window=torch.ones(4), return_complex=True)
        return h + torch.istft(wave, 4, window=torch.ones(4)).sum()

    graph = sc.trace(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), Between(body)).eval(), torch.randn(2, 5, 6))
    assert "aten.istft.default" in names(graph)
    assert [group.name for group in graph.groups] == ["0"]


def test_sizes_that_depend_on_data_keep_their_symbols() -> None:
    def body(h: Tensor) -> Tensor:
        return h + h[torch.argwhere(h[:, 0, 0] > -9)[:, 0]].sum()

    graph: Any = sc.trace(
        nn.Sequential(nn.Linear(6, 6), nn.ReLU(), Between(body)).eval(), torch.randn(2, 5, 6)
    )
    assert "0" in [group.name for group in graph.groups]
