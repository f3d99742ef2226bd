"""What to do about a forward pass that a capture cannot follow: the advice works when it is followed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from tests.graph.tiny import Calls

Forward = Callable[[nn.Module, Tensor, Tensor], Tensor]


def pooled(net: nn.Module, x: Tensor, of: Tensor) -> Tensor:
    count = int(of.max()) + 1
    return pool(net, x, of, count)


def pooled_as_told(net: nn.Module, x: Tensor, of: Tensor) -> Tensor:
    count = of.max().long().item() + 1
    return pool(net, x, of, count)


def pool(net: nn.Module, x: Tensor, of: Tensor, count: int) -> Tensor:
    h = net.a(x).relu()
    out: Tensor = net.b(h.new_zeros(count, h.size(1)).index_add(0, of, h))
    return out


def scaled(net: nn.Module, x: Tensor, of: Tensor) -> Tensor:
    out: Tensor = net.b(net.a(x).relu()) * float(x.mean())
    return out


def cut(net: nn.Module, x: Tensor, of: Tensor) -> Tensor:
    out: Tensor = net.b(net.a(x).relu())[: int(x.abs().mean() * 9)]
    return out


def cut_as_told(net: nn.Module, x: Tensor, of: Tensor) -> Tensor:
    out: Tensor = net.b(net.a(x).relu())[: (x.abs().mean() * 9).long().item()]
    return out


def branched(net: nn.Module, x: Tensor, of: Tensor) -> Tensor:
    h = net.a(x).relu()
    if int(of.max()) > 2:
        h = h * 2
    out: Tensor = net.b(h)
    return out


def branched_as_told(net: nn.Module, x: Tensor, of: Tensor) -> Tensor:
    h = net.a(x).relu()
    out: Tensor = net.b(torch.where(of.max() > 2, h * 2, h))
    return out


def repeated(net: nn.Module, x: Tensor, of: Tensor) -> Tensor:
    h = net.a(x).relu()
    while h.max() > 1e-9:
        h = h / 2
    out: Tensor = net.b(h)
    return out


def looped(net: nn.Module, x: Tensor, of: Tensor) -> Tensor:
    h = net.a(x).relu()
    for _ in range(int(x.abs().max())):
        h = h + 1
    out: Tensor = net.b(h)
    return out


def listed(net: nn.Module, x: Tensor, of: Tensor) -> Tensor:
    out: Tensor = net.b(net.a(x).relu()) * [1.0, 2.0, 3.0, 4.0][int(x.sigmoid().max())]
    return out


def traced(forward: Forward) -> list[str]:
    net = Calls(forward, a=nn.Linear(3, 5), b=nn.Linear(5, 2))
    graph = sc.trace(net, (torch.randn(8, 3), torch.arange(8) // 2))
    return [group.name for group in graph.groups]


@pytest.mark.parametrize(
    ("forward", "told", "followed"),
    [
        (cut, r"Write \.long\(\)\.item\(\) in place of int\(\)", cut_as_told),
        (repeated, r"Use torch\.where", branched_as_told),
        (looped, r"all values\. Decide it before the model is called, and pass a number", None),
        (listed, r"all values\. Decide it before the model is called, and pass a number", None),
    ],
)
def test_the_remedy_fits_the_expression_and_works(
    forward: Forward, told: str, followed: Forward | None
) -> None:
    with pytest.raises(sc.CaptureError, match=told) as refused:
        traced(forward)
    assert ("torch.where" in str(refused.value)) == (forward is repeated)
    assert followed is None or traced(followed) == ["a"]


def test_a_count_read_from_a_tensor_needs_no_remedy() -> None:
    assert traced(pooled) == traced(pooled_as_told) == ["a"]


def test_neither_do_a_factor_and_a_condition() -> None:
    assert traced(scaled) == traced(branched) == ["a"]


def differentiated(net: nn.Module, x: Tensor, of: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(net.b(net.a(x).tanh()).sum(), x)[0]


def by_function(net: nn.Module, x: Tensor, of: Tensor) -> Tensor:
    return torch.func.grad(lambda v: net.b(net.a(v).tanh()).sum())(x)


def by_sample(net: nn.Module, x: Tensor, of: Tensor) -> Tensor:
    return torch.func.vmap(torch.func.grad(lambda v: net.b(net.a(v).tanh()).sum()))(x)


@pytest.mark.parametrize("forward", [differentiated, by_function, by_sample])
def test_derivatives_in_the_forward_pass(forward: Forward) -> None:
    with pytest.raises(sc.CaptureError, match=r"takes a derivative .* as a separate model") as refused:
        traced(forward)
    assert "fake tensor" not in str(refused.value)
    assert ("test_foreign.py" in str(refused.value)) == (forward is by_sample)


def covariance(net: nn.Module, x: Tensor, of: Tensor) -> Tensor:
    out: Tensor = net.b(net.a(x).relu()) + torch.cov(x.T).sum()
    return out


def test_functions_that_look_at_values() -> None:
    words = r"test_foreign.py:\d+: .*torch\.cov.*reads the values of a tensor.*other functions\.$"
    with pytest.raises(sc.CaptureError, match=words):
        traced(covariance)
