"""Why a model has nothing to prune: a missing rule, an operator that mixes, or one that orders."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from tests.graph.tiny import Calls

RULE, MIXED, PLACED = "A rule is missing", "An operator mixes the units", "Every unit has to stay"


def both(x: Tensor) -> Tensor:
    return nn.functional.layer_norm(x, (8,))


@pytest.mark.parametrize(
    ("function", "cause", "operator"),
    [
        (lambda x: x.histc(8).expand(len(x), 8) * x, RULE, "no rule for aten.histc.default"),
        (both, MIXED, "mixed by aten.layer_norm.default"),
        (lambda x: x.cumsum(1), MIXED, "mixed by aten.cumsum.default"),
        (lambda x: x.sort(1)[0], PLACED, "aten.sort.default: put in order"),
    ],
)
@pytest.mark.parametrize("prune", [False, True])
def test_the_message_names_the_kind_of_reason(
    function: Callable[[Tensor], Tensor], cause: str, operator: str, prune: bool
) -> None:
    model = Calls(lambda m, x: m.b(function(m.a(x))), a=nn.Linear(3, 8), b=nn.Linear(8, 2)).eval()
    x = torch.randn(4, 3)
    with pytest.raises(sc.NothingToPruneError) as refused:
        sc.prune(model, [(x, torch.arange(4) % 2)] * 5, progress=False) if prune else sc.trace(model, x)
    text = str(refused.value)
    assert cause in text
    assert operator in text
    assert not any(other in text for other in {RULE, MIXED, PLACED} - {cause})
    assert ("allow_inexact=True" in text) == (cause == MIXED)
    assert ("CONTRIBUTING" in text) == (cause == RULE)


def test_all_kinds_are_named_in_a_short_message() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        x = nn.functional.layer_norm(m.a(x), (8,))
        x = m.b(x)
        x = m.c(x.histc(9).expand(len(x), 9) * x)
        return m.d(x.sort(1)[0])

    parts = {"a": nn.Linear(3, 8), "b": nn.Linear(8, 9), "c": nn.Linear(9, 7), "d": nn.Linear(7, 2)}
    with pytest.raises(sc.NothingToPruneError) as refused:
        sc.trace(Calls(forward, **parts).eval(), torch.randn(4, 3))
    text = str(refused.value)
    assert all(cause in text for cause in (RULE, MIXED, PLACED))
    assert len(text) <= 600


def test_the_report_names_the_kind_of_reason_for_what_was_left() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        x = nn.functional.layer_norm(m.b(m.a(x).relu()), (8,))
        x = m.c(x)
        return m.d(x.histc(9).expand(len(x), 9) * x)

    parts = {"a": nn.Linear(3, 10), "b": nn.Linear(10, 8), "c": nn.Linear(8, 9), "d": nn.Linear(9, 2)}
    data = [(torch.randn(8, 3), torch.arange(8) % 2) for _ in range(5)]
    result = sc.prune(
        Calls(forward, **parts).eval(), data, sc.Budget(params=0.8), "uniform", repair=None, progress=False
    )
    text = str(result.report)
    assert "mixed by aten.layer_norm.default" in text
    assert "no rule for aten.histc.default" in text


class Regrouped(nn.Module):
    """Reads an image's channels as positions, which a capture at one channel a position does not show."""

    def __init__(self) -> None:
        super().__init__()
        self.i, self.b, self.o = nn.Conv2d(3, 32, 1), nn.Conv2d(32, 32, 1), nn.Conv2d(32, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.i(x)
        y = self.b(x).flatten(2).transpose(1, 2)
        return self.o(x + y.reshape(x.shape))


def test_units_that_a_reshape_ties_together_name_its_line() -> None:
    with pytest.raises(sc.NothingToPruneError) as caught:
        sc.trace(Regrouped().eval(), torch.randn(2, 3, 2, 2))
    said = str(caught.value)
    assert "return self.o(x + y.reshape(x.shape)) ties 32 positions of i.weight" in said
    assert "at another size of the inputs" in said
    assert len(said) <= 600
