"""Which cut tensors move the output: seen where they do, listed where they do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc
from secateur.proof.exercised import Exercise, perturbed_copy
from tests.graph.tiny import Calls
from tests.targets.units.plans import random_plan


def proof_of(model: nn.Module, x: Any, form: str = "module", **options: Any) -> sc.Proof:
    graph = sc.trace(model, x)
    plan = random_plan(graph)
    return sc.verify(model, sc.apply(model, plan, form, graph=graph), plan, x, **options)


def two(function: Callable[[Tensor], Tensor], width: int = 8) -> nn.Module:
    torch.manual_seed(0)
    net = Calls(lambda m, x: m.b(function(m.a(x))), a=nn.Linear(3, width), b=nn.Linear(width, 2))
    return net.eval()


class Sign(torch.autograd.Function):
    """Rounds on the way forward and lets no gradient back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> None:
        return None


@torch.no_grad()
def frozen(x: Tensor) -> Tensor:
    return torch.tanh(x)


STOPS: dict[str, Callable[[Tensor], Tensor]] = {
    "no_grad": frozen,
    "detach": lambda x: torch.tanh(x.detach()),
    "sign": torch.sign,
    "round": lambda x: (3 * x).round(),
    "straight through": lambda x: x + (x.sign() - x).detach(),
    "comparison": lambda x: (x > 0).to(x.dtype),
    "own function": lambda x: Sign.apply(x),
}


@pytest.mark.parametrize("form", ["module", "graph"])
@pytest.mark.parametrize("function", STOPS.values(), ids=STOPS)
def test_what_stops_gradients_hides_nothing(function: Callable[[Tensor], Tensor], form: str) -> None:
    proof = proof_of(two(function), torch.randn(64, 3), form)
    assert proof.proven
    assert set(proof.exercised) == {"a.weight", "a.bias", "b.weight"}
    assert all(moved for moved, _ in proof.exercised.values())


def test_no_gradient_at_all() -> None:
    torch.manual_seed(0)
    net = Calls(lambda m, x: m.b(m.a(x).relu()).argmax(-1), a=nn.Linear(3, 16), b=nn.Linear(16, 9)).eval()
    assert proof_of(net, torch.randn(200, 3)).proven


def test_a_gated_off_branch_is_listed_and_not_proven() -> None:
    torch.manual_seed(0)
    net = Calls(
        lambda m, x: m.b(m.a(x).relu()) + m.d(m.c(x).clamp(max=-1e9) + 1e9),
        a=nn.Linear(3, 8),
        b=nn.Linear(8, 2),
        c=nn.Linear(3, 7),
        d=nn.Linear(7, 2),
    ).eval()
    proof = proof_of(net, torch.randn(9, 3))
    assert not proof.proven
    assert proof.not_exercised == ("c.weight", "c.bias", "d.weight")
    assert proof.doubts == ("3 of the 6 tensors that were cut moved no output: c.weight, c.bias, d.weight",)
    assert proof.exercised["a.weight"][0] > 0
    assert proof.exercised["c.weight"] == (0, 5)


def test_a_factor_of_zero_hides_nothing() -> None:
    """The last scale of a residual branch often starts at zero."""
    torch.manual_seed(0)
    net = Calls(
        lambda m, x: m.out(x + m.scale * m.b(m.a(x).relu())),
        a=nn.Linear(6, 8),
        b=nn.Linear(8, 6),
        scale=nn.Parameter(torch.zeros(6)),
        out=nn.Linear(6, 2),
    ).eval()
    x = torch.randn(5, 6)
    graph = sc.trace(net, x)
    plan = random_plan(graph)
    small = sc.apply(net, plan, "module", graph=graph)
    proof = sc.verify(net, small, plan, x)
    assert proof.proven
    assert proof.other_weights == ("a.bias", "a.weight", "b.weight")
    with torch.no_grad():
        small.a.weight[0] += 1  # behind the zeros
    with pytest.raises(sc.VerificationError, match="with random numbers added to all weights"):
        sc.verify(net, small, plan, x)


@pytest.mark.parametrize("name", ["softmax", "norm"])
def test_what_is_cancelled_by_construction_is_no_doubt(name: str) -> None:
    torch.manual_seed(0)

    def attend(m: Any, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, 3)).transpose(1, 2) for layer in (m.q, m.k, m.v))
        mixed = (q @ k.transpose(2, 3)).softmax(-1) @ v
        return m.out(m.o(mixed.transpose(1, 2).flatten(2)))

    if name == "softmax":
        net = Calls(
            attend,
            q=nn.Linear(6, 12),
            k=nn.Linear(6, 12),
            v=nn.Linear(6, 12),
            o=nn.Linear(12, 5),
            out=nn.Linear(5, 2),
        )
        x, hidden = torch.randn(3, 7, 6), "k.bias"
    else:
        norm = nn.BatchNorm2d(8, track_running_stats=False)
        a, b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1)
        net = Calls(lambda m, x: m.b(m.norm(m.a(x)).relu()), a=a, norm=norm, b=b)
        x, hidden = torch.randn(4, 3, 8, 8), "a.bias"
    proof = proof_of(net.eval(), x)
    assert proof.cancelled == (hidden,)
    assert proof.proven
    assert proof.not_exercised == (hidden,)


def test_inputs_that_show_nothing_are_no_proof() -> None:
    proof = proof_of(two(torch.relu), torch.zeros(5, 3), other_sizes=False)
    assert proof.not_exercised == ("a.weight",)
    assert not proof.proven
    assert proof_of(two(torch.relu), torch.zeros(5, 3)).proven, "drawn inputs see it"


def test_parameters_that_are_read_nowhere_are_no_cancelled_ones() -> None:
    """Same layer, same positions, but no gradient reaches them."""
    torch.manual_seed(0)

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.shift = nn.Parameter(torch.randn(8, 3)), nn.Parameter(torch.randn(8))

        def forward(self, x: Tensor) -> Tensor:
            y = F.linear(x, self.weight)
            return torch.where(y.abs() > 1e9, y + self.shift, y)

    net = Calls(lambda m, x: m.b(m.a(x)), a=Layer(), b=nn.Linear(8, 2)).eval()
    proof = proof_of(net, torch.randn(4, 3))
    assert proof.not_exercised == ("a.shift",)
    assert not proof.cancelled


def test_batch_norm_statistics_count() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1)).eval()
    for form in ("module", "graph"):
        proof = proof_of(net, torch.randn(2, 3, 6, 6), form)
        assert {"1.running_mean", "1.running_var"} <= set(proof.exercised)
        assert proof.proven


def test_spoiling_changes_every_entry_and_keeps_its_sign() -> None:
    x = torch.tensor([0.0, -2.0, 3.0])
    y = perturbed_copy(x)
    assert bool((y != x).all())
    assert bool((y[1:].sign() == x[1:].sign()).all())
    assert perturbed_copy(torch.tensor([1, 2, 3])).tolist() == [3, 2, 1]
    assert x.tolist() == [0.0, -2.0, 3.0]


def attends(m: Any, x: Tensor) -> Tensor:
    """Two heads of three dimensions; of one position, neither queries nor keys are read. [batch, n, 6]"""
    q, k, v = (layer(x).unflatten(-1, (-1, 3)).transpose(1, 2) for layer in (m.q, m.k, m.v))
    return m.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)) * (x.shape[1] or 1)


def test_what_gradients_show_at_one_size_is_not_spoiled_at_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """And sizes of one position, which show less, come last."""
    spoiled: list[Any] = []
    monkeypatch.setattr(Exercise, "by_perturbation", lambda self, small, *args, **_: spoiled.append(args))
    looked: list[list[int]] = []
    look = Exercise.by_gradients

    def looking(self: Exercise, small: Any, args: Any, *rest: Any) -> None:
        looked.append(list(args[0].shape))
        look(self, small, args, *rest)

    monkeypatch.setattr(Exercise, "by_gradients", looking)
    torch.manual_seed(0)
    layers = {name: nn.Linear(6, 12, bias=False) for name in "qkv"}
    net = Calls(attends, **layers, out=nn.Linear(12, 2)).eval()
    graph = sc.trace(net, torch.randn(2, 5, 6))
    plan = random_plan(graph)
    small = sc.apply(net, plan, "module", graph=graph)
    proof = sc.verify(net, small, plan, torch.randn(2, 1, 6))
    assert proof.proven
    assert set(proof.exercised) == {"q.weight", "k.weight", "v.weight", "out.weight"}
    assert "input 0 [2, 1, 6]" in proof.sizes
    assert looked
    assert all(shape[1] > 1 for shape in looked)
    assert not spoiled
