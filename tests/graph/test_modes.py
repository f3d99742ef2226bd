"""Code that asks for PyTorch's mode: gradients, autocast or dtype. It runs other lines there."""

from __future__ import annotations

import cProfile
import pstats
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.graph.modes import Mode
from tests.targets.units.plans import random_plan

LOW = (torch.float16, torch.bfloat16)


class Net(nn.Module):
    """Linear layers with a branch of the user's between them."""

    def __init__(self, branch: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.o = nn.Linear(6, 16), nn.Linear(16, 12), nn.Linear(12, 3)
        self.c = nn.Linear(16, 16)
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 6] to [batch, 3]."""
        return self.o(self.b(self.branch(self, self.a(x).relu())).relu())


def low_roll(net: nn.Module, h: Tensor) -> Tensor:
    return h.roll(1, -1) if h.dtype in LOW else h


def half_literal(net: nn.Module, h: Tensor) -> Tensor:
    return h.reshape(-1, 16) * 2 if net.a.weight.dtype == torch.float16 else h


def double_layer(net: nn.Module, h: Tensor) -> Tensor:
    return net.c(h) if h.dtype is torch.float64 else h


def autocast_mean(net: nn.Module, h: Tensor) -> Tensor:
    return h - h.mean(-1, keepdim=True) if torch.is_autocast_enabled("cpu") else h


def autocast_layer(net: nn.Module, h: Tensor) -> Tensor:
    return net.c(h) if torch.is_autocast_enabled("cpu") else h


def gradients_mean(net: nn.Module, h: Tensor) -> Tensor:
    return h - h.mean(-1, keepdim=True) if torch.is_grad_enabled() else h


def no_gradients_mean(net: nn.Module, h: Tensor) -> Tensor:
    return h if torch.is_grad_enabled() else h - h.mean(-1, keepdim=True)


def requires_gradients_flip(net: nn.Module, h: Tensor) -> Tensor:
    return h.flip(-1) if h.requires_grad else h


BRANCHES = [
    low_roll, half_literal, double_layer, autocast_mean, autocast_layer, gradients_mean, no_gradients_mean,
    requires_gradients_flip,
]  # fmt: skip
MODES = [
    Mode(gradients=False), Mode(gradients=True), Mode(autocast=True), Mode(dtype=torch.float16),
    Mode(dtype=torch.bfloat16), Mode(dtype=torch.float64),
]  # fmt: skip


@pytest.mark.parametrize("branch", BRANCHES, ids=lambda f: f.__name__)
def test_the_pruned_model_equals_the_masked_one_in_every_mode(branch: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    model, x = Net(branch).eval(), torch.randn(4, 6)
    graph = sc.trace(model, x)
    plan = random_plan(graph, 0.4, 1)
    assert any(group.removed for group in plan.groups)
    small, masked = sc.apply(model, plan, "module", graph=graph), sc.apply(model, plan, "masked")
    for mode in MODES:
        (given,), _ = mode.cast(((x,), {}))
        outputs = []
        for net in (small, masked):
            with mode.on(net):
                outputs.append(net(given).double().detach())
        assert outputs[0].shape == outputs[1].shape
        tolerance = 0.05 if mode.autocast or mode.dtype in LOW else 1e-5
        assert (outputs[0] - outputs[1]).abs().max() <= tolerance * outputs[1].abs().max(), mode
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("branch", [gradients_mean, no_gradients_mean, requires_gradients_flip])
def test_a_captured_program_of_code_that_asks_for_gradients_is_refused(branch: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    model, x = Net(branch).eval(), torch.randn(4, 6)
    graph = sc.trace(model, x)
    with pytest.raises(sc.ApplyError, match="same with and without gradients"):
        sc.apply(model, random_plan(graph, 0.4, 1), "graph", graph=graph)


def test_only_code_that_asks_is_captured_again() -> None:
    torch.manual_seed(0)
    plain = Net(lambda net, h: h.to(net.a.weight.dtype))
    assert sc.trace(plain.eval(), torch.randn(4, 6)).views == ()
    (view,) = sc.trace(Net(half_literal).eval(), torch.randn(4, 6)).views
    assert view.mode == Mode(dtype=torch.float16)


class Counting(nn.Module):
    """A network that converts where autocast is on, and counts its steps in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.o = nn.Linear(6, 16), nn.Linear(16, 3)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 6] to [batch, 3]."""
        if self.training:
            self.steps += 1
        h = self.a(x).relu()
        return self.o(h.to(torch.bfloat16).contiguous() if torch.is_autocast_enabled("cpu") else h)


def test_what_changes_no_axis_needs_no_capture() -> None:
    torch.manual_seed(0)
    model, x = Counting().eval(), torch.randn(4, 6)
    graph = sc.trace(model, x)
    assert (graph.views, graph.inputs.training) == ((), False)
    plan = random_plan(graph, 0.4, 1)
    small = sc.apply(model, plan, "module", graph=graph)
    assert sc.verify(model, small, plan, x).training
    small.train()(x)
    assert small.steps == 1
    with Mode(autocast=True).on(small.eval()):
        assert small(x).shape == (4, 3)


def test_a_profile_of_the_users_goes_on() -> None:
    def called_later() -> None:
        """Here for its name."""

    profile = cProfile.Profile()
    profile.enable()
    try:
        sc.trace(Counting().eval(), torch.randn(4, 6))
        called_later()
    finally:
        profile.disable()
    assert any(entry[2] == "called_later" for entry in pstats.Stats(profile).stats)


class HookedInTraining(nn.Module):
    """A network that changes the gradient of its hidden units while it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.o = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 6] to [batch, 3]."""
        h = self.a(x).relu()
        if self.training:
            h.register_hook(lambda gradient: gradient.clamp(-1, 1))
        return self.o(h)


def test_training_mode_is_recorded_with_gradients() -> None:
    torch.manual_seed(0)
    model, x = HookedInTraining().eval(), torch.randn(4, 6)
    graph = sc.trace(model, x)
    plan = random_plan(graph, 0.4, 1)
    small = sc.apply(model, plan, "module", graph=graph)
    assert sc.verify(model, small, plan, x).proven
    small.train()(x).sum().backward()
    assert small.a.weight.grad.shape == (small.a.out_features, 6)
