"""Conditions on values of tensors: ``if mask.any():``, ``if float(h.max()) > 3:``, empty lists of tokens."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.errors import InputError
from secateur.graph.symbolic import MOST
from tests.targets.units.plans import random_plan


class Net(nn.Module):
    """Linear layers with a branch of the user's between them."""

    def __init__(self, branch: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.o = nn.Linear(6, 16), nn.Linear(16, 12), nn.Linear(12, 3)
        self.c, self.width = nn.Linear(16, 12), 16
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 6] to [batch, 3]."""
        return self.o(self.branch(self, x, self.a(x).relu()).relu())


def mean(net: nn.Module, x: Tensor, h: Tensor) -> Tensor:
    if x.mean() > 0:
        h = h - h.mean(-1, keepdim=True)
    return net.b(h)


def layers(net: nn.Module, x: Tensor, h: Tensor) -> Tensor:
    return net.b(h) if x.sum().item() > 0 else net.c(h)


def attribute(net: nn.Module, x: Tensor, h: Tensor) -> Tensor:
    return net.b(h.reshape(-1, net.width) / 3 if float(x.max()) > 2.0 else h)


def chosen(net: nn.Module, x: Tensor, h: Tensor) -> Tensor:
    rows = torch.nonzero(x[:, 0] > 0.5)[:, 0]
    y = net.b(h)
    if len(rows) == 0:
        return y
    return y.index_add(0, rows, net.c(h[rows]))


def masked(net: nn.Module, x: Tensor, h: Tensor) -> Tensor:
    y = net.b(h)
    for layer, rows in ((net.c, x[:, 0] > 0.5), (net.b, x[:, 1] > 0.5)):
        if rows.any():
            y = y.index_add(0, torch.nonzero(rows)[:, 0], layer(h[rows]))
    return y


def nested(net: nn.Module, x: Tensor, h: Tensor) -> Tensor:
    if x.mean() > 0:
        if x.max() > 1.5:
            h = h.flip(-1)
        return net.b(h)
    return net.c(h)


def largest(net: nn.Module, x: Tensor, h: Tensor) -> Tensor:
    rows = x[:, 0] > 2.5  # of the traced input none is: what the other branch does then fails
    return net.b(h) + net.c(h[rows]).amax(0) if rows.any() else net.b(h)


BRANCHES = [mean, layers, attribute, chosen, masked, nested, largest]


@pytest.mark.parametrize("branch", BRANCHES, ids=lambda f: f.__name__)
def test_the_pruned_model_equals_the_masked_one_on_either_side(branch: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    model, x = Net(branch).double().eval(), torch.randn(4, 6).double()
    graph = sc.trace(model, x)
    plan = random_plan(graph, 0.4, 1)
    assert any(group.removed for group in plan.groups)
    small, dense = sc.apply(model, plan, "module", graph=graph), sc.apply(model, plan, "masked")
    for shift in (-3.0, -0.5, -0.1, 0.0, 0.1, 0.5, 3.0):
        given = torch.randn(5, 6).double() + shift
        torch.testing.assert_close(small(given), dense(given))
        torch.testing.assert_close(small.train()(given), dense.train()(given))
        small.eval()
        dense.eval()
    with pytest.raises(sc.ApplyError, match="conditions on values of tensors"):
        sc.apply(model, plan, "graph", graph=graph)


ASKS: list[Callable[[Tensor], object]] = [
    lambda h: h.max() > 2,
    lambda h: h.norm().item() > 5,
    lambda h: float(h.abs().sum()) > 30,
    lambda h: int(h.sum(0).argmax()) > 8,
    lambda h: (h > 2).any(),
    lambda h: len(torch.nonzero(h[0])) > 8,
    lambda h: h[0, 3] > 0.3,
    lambda h: sum(h[0].tolist()) > 4,
]
"""What code asks of the values of units, and goes one way or another."""


@torch.no_grad()
@pytest.mark.parametrize("asks", ASKS)
def test_what_a_condition_reads_of_units_is_kept(asks: Callable[[Tensor], object]) -> None:
    """Without a unit that it reads, the pruned model would go another way than the masked one."""

    def branch(net: nn.Module, x: Tensor, h: Tensor) -> Tensor:
        return net.b(h * 2) if asks(h) else net.c(h)

    torch.manual_seed(1)
    model, x = Net(branch).double().eval(), torch.randn(4, 6).double()
    graph = sc.trace(model, x)
    for seed in range(3):
        plan = random_plan(graph, 0.5, seed)
        small, dense = (sc.apply(model, plan, form, graph=graph) for form in ("module", "masked"))
        for given in torch.randn(40, 4, 6).double() * torch.linspace(0.3, 3, 40)[:, None, None]:
            torch.testing.assert_close(small(given), dense(given))
    sc.verify(model, small, plan)


UNTAKEN: list[Callable[[nn.Module, Tensor], Tensor]] = [
    lambda net, h: h * h.shape[1],
    lambda net, h: h * net.width,
    lambda net, h: h.view(len(h), 4, 4).flip(-1).flatten(1),
    lambda net, h: torch.cat([h[:, :8], h[:, 8:] * 2], 1),
    lambda net, h: h * torch.tensor([1.0, 2.0] * 8).to(h),
]
"""What the branch does that no input takes: with numbers that follow the number of units."""


@torch.no_grad()
@pytest.mark.parametrize("does", UNTAKEN)
def test_a_branch_that_no_input_takes_is_right_or_refused(does: Callable[..., Tensor]) -> None:
    def branch(net: nn.Module, x: Tensor, h: Tensor) -> Tensor:
        if (x > 100).any():
            h = does(net, h)
        return net.b(h) + net.c(h)

    torch.manual_seed(0)
    model, x = Net(branch).double().eval(), torch.randn(4, 6).double()
    graph = sc.trace(model, x)
    plan = random_plan(graph, 0.4, 1)
    if does is UNTAKEN[-1]:
        with pytest.raises(sc.ApplyError, match="size that does not follow"):
            sc.apply(model, plan, "module", graph=graph)
        return
    small = sc.apply(model, plan, "module", graph=graph)
    assert sc.verify(model, small, plan).proven
    dense = sc.apply(model, plan, "masked")
    for given in (x, x * 300):
        torch.testing.assert_close(small(given), dense(given))


@torch.no_grad()
def test_a_proof_looks_at_the_branch_that_no_input_takes() -> None:
    def branch(net: nn.Module, x: Tensor, h: Tensor) -> Tensor:
        return (net.b(h) + net.c(h)) * (net.late if (x > 100).any() else 1)

    torch.manual_seed(0)
    model, x = Net(branch).double().eval(), torch.randn(4, 6).double()
    model.late = 1
    graph = sc.trace(model, x)
    plan = random_plan(graph, 0.4, 1)
    small = sc.apply(model, plan, "module", graph=graph)
    small.late = 2
    with pytest.raises(sc.VerificationError, match="conditions on values of tensors are True"):
        sc.verify(model, small, plan)


@torch.no_grad()
@pytest.mark.parametrize("error", [InputError, RuntimeError])
def test_a_pruned_model_may_refuse_a_branch_in_words(error: type[Exception]) -> None:
    """Perhaps no values lead there; but it may not fail otherwise where the dense model runs."""

    def branch(net: nn.Module, x: Tensor, h: Tensor) -> Tensor:
        if (x > 100).any() and net.refuses:
            raise error("size 7")
        return net.b(h) + net.c(h)

    torch.manual_seed(0)
    model, x = Net(branch).double().eval(), torch.randn(4, 6).double()
    model.refuses = False
    graph = sc.trace(model, x)
    plan = random_plan(graph, 0.4, 1)
    small = sc.apply(model, plan, "module", graph=graph)
    small.refuses = True
    if error is InputError:
        assert sc.verify(model, small, plan).proven
    else:
        with pytest.raises(sc.VerificationError, match=r"size 7.* conditions on values of tensors are True"):
            sc.verify(model, small, plan)


def dropped(net: nn.Module, x: Tensor, h: Tensor) -> Tensor:
    if net.training and float(torch.rand([])) < 0.5:
        h = h.roll(1, -1)
    return net.b(h)


def test_what_training_does_at_random_is_seen() -> None:
    torch.manual_seed(0)
    (group,) = sc.trace(Net(dropped).eval(), torch.randn(4, 6)).groups
    assert group.name == "b"  # all units of `a` take each other's place


def endless(net: nn.Module, x: Tensor, h: Tensor) -> Tensor:
    while h.norm() > 1:
        h = h / 2
    return net.b(h)


def test_a_loop_that_values_end_is_refused_in_words() -> None:
    assert MOST < 1000
    with pytest.raises(sc.CaptureError, match=r"while h\.norm\(\) > 1: the code there depends on"):
        sc.trace(Net(endless).eval(), torch.randn(4, 6))
