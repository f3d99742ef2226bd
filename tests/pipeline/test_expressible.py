"""Groups that no module can express are left whole, and the budget is spent on the others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from tests.pipeline.test_prune import QUICK


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


class Attention(nn.Module):
    """A block that says its width in numbers, as many do; no module can change that of its stream."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.qkv, self.p = nn.Linear(6, 16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.out, self.heads = nn.Linear(16, 3), 4

    def forward(self, x: Tensor) -> Tensor:
        """Gives three numbers for each position."""
        x = self.e(x)
        b, t, c = x.size()
        parts = self.qkv(x).split(16, 2)
        q, k, v = (part.view(b, t, self.heads, c // self.heads).transpose(1, 2) for part in parts)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(x + self.p(y.transpose(1, 2).contiguous().view(b, t, c)))


@pytest.mark.parametrize("steps", [2, 3])
def test_rounds_go_as_far_as_one_decision(steps: int) -> None:
    """Each round is carried out on the dense model, not on code that the round before mended."""
    torch.manual_seed(0)
    data = [(torch.randn(8, 5, 6), torch.randn(8, 5, 3)) for _ in range(4)]
    result = sc.prune(Attention(), data, sc.Budget(params=0.6), "uniform", steps=steps, **QUICK)
    assert isinstance(result.model, Attention)
    assert result.plan.predicted.params <= 0.6 * result.plan.dense.params
    assert result.report.note.count("mended at the call") == 1


class Both(Listed):
    """No layer of it can be smaller in a module."""

    def forward(self, x: Tensor) -> Tensor:
        """Gives three logits."""
        scales = torch.tensor(self.scales, dtype=x.dtype)
        return self.c((self.b((self.a(x).relu() * scales)).relu()) * scales)


def test_where_no_group_is_left_the_error_says_what_a_module_cannot_express(batches: list[object]) -> None:
    expected = (
        "^prune: expected a group that a module can express, got none.*: groups that need form 'graph': "
    )
    with pytest.raises(sc.NothingToPruneError, match=expected):
        sc.prune(Both(), batches, sc.Budget(params=0.7), sc.Uniform(), **QUICK)


def test_where_a_round_leaves_other_units_alone_the_error_says_so() -> None:
    """One block of the grouped convolution is left, whose channels could go one by one."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(24, 2)
    )
    data = [torch.randn(4, 3, 4, 4) for _ in range(4)]
    with pytest.raises(sc.NothingToPruneError, match=r"round 3 of 3: .*into parts.* Use fewer steps\."):
        sc.prune(model, data, sc.Budget(params=0.1), "uniform", steps=3, **QUICK)
