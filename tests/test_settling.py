"""Groups that no module can express are left whole, and the budget is spent on the others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from tests.test_prune import QUICK


class Listed(nn.Module):
    """A layer with a list of one number for each channel, which no module of fewer channels reads rightly."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.scales = [1.0 + k for k in range(16)]

    def forward(self, x: Tensor) -> Tensor:
        """Gives three logits."""
        x = self.a(x).relu() * torch.tensor(self.scales, dtype=x.dtype)
        return self.c(self.b(x).relu())


@pytest.fixture
def batches() -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    return [(torch.randn(8, 6), torch.randint(0, 3, (8,))) for _ in range(4)]


@pytest.mark.parametrize("steps", [1, 2])
def test_the_budget_is_spent_on_the_groups_that_a_module_can_express(
    batches: list[object], steps: int
) -> None:
    torch.manual_seed(0)
    budget = sc.Budget(params=0.7)
    result = sc.prune(Listed(), batches, budget, sc.Uniform(), steps=steps, **QUICK)
    assert isinstance(result.model, Listed)
    assert {g.name: bool(g.removed) for g in result.plan.groups} == {"a": False, "b": True}
    assert result.plan.predicted.params <= 0.7 * result.plan.dense.params
    assert "left whole" in result.report.note
    assert "a" in result.report.note


def test_a_program_takes_all_groups(batches: list[object]) -> None:
    result = sc.prune(
        Listed(), batches, sc.Budget(params=0.7), sc.Uniform(), on_unrealisable="graph", **QUICK
    )
    assert result.report.form == "graph"
    assert all(g.removed for g in result.plan.groups)


def test_a_budget_that_the_other_groups_do_not_reach(batches: list[object]) -> None:
    with pytest.raises(sc.UnreachableBudgetError, match="Pass on_unrealisable='graph'"):
        sc.prune(Listed(), batches, sc.Budget(params=0.2), sc.Uniform(), **QUICK)
