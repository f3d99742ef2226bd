"""Random weights: the same for a seed, and none that hides the others."""

from __future__ import annotations

import copy

import torch
from torch import nn

from tests.zoo.walk import varies
from tests.zoo.weights import build, settle


class Hidden(nn.Module):
    """Zeros and layer scale in the places where constructors put them."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 8)
        self.b = copy.deepcopy(self.a)
        self.scale = nn.Parameter(torch.full((8,), 1e-6))
        self.token = nn.Parameter(torch.randn(1, 8))
        self.head = nn.Linear(8, 4)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head((self.a(x) + self.b(x)) * self.scale + self.token)


def test_no_parameter_is_constant_and_global_random_state_is_left_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    model = build(Hidden)
    assert torch.equal(torch.get_rng_state(), before)
    for name, parameter in model.named_parameters():
        assert parameter.std() > 1e-3, name
    assert varies([model(torch.randn(2, 3))])


def test_weights_follow_the_seed() -> None:
    one, same, other = (build(Hidden, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)


def test_settled_statistics_are_those_of_the_batches() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3)).eval()
    batches = [(torch.randn(6, 3) * 4 + 2,) for _ in range(2)]
    settle(model, batches)
    torch.testing.assert_close(model[0].running_mean, torch.cat([b for (b,) in batches]).mean(0))
    assert not model[0].training


def test_constant_and_infinite_outputs_are_told_from_those_that_vary() -> None:
    assert varies([torch.tensor([1.0, 2.0, float("-inf")])])
    assert not varies([torch.ones(4)])
    assert not varies([torch.full((4,), float("nan"))])
    assert not varies([torch.arange(4), torch.zeros(4)])
