"""Smaller copies of modules."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import secateur as sc


class Listed(nn.Module):
    """Lists that hold None, and one module twice."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.Linear(8, 8)
        self.first, self.layers = nn.Linear(4, 8), nn.ModuleList([layer, layer])
        self.norms = nn.ModuleList([None, nn.Linear(8, 2)])  # type: ignore[list-item]

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = x + layer(x).relu()
        return self.norms[1](x)


def test_lists_keep_none_and_modules_that_come_twice() -> None:
    torch.manual_seed(0)
    model, x = Listed().double().eval(), torch.randn(3, 4, dtype=torch.float64)
    graph = sc.trace(model, x)
    plan = sc.Uniform(ratio=0.25).allocate(graph, sc.score(graph, None, "magnitude"))
    small = sc.apply(model, plan, "module", graph=graph)
    assert small.layers[0] is small.layers[1]
    assert small.layers[0].weight.shape == (6, 6)
    torch.testing.assert_close(small(x), sc.apply(model, plan, "masked")(x), rtol=1e-11, atol=1e-11)


TABLE = torch.linspace(1, 2, 16, dtype=torch.float64)


class Scaled(nn.Module):
    """A network that scales by numbers which no module holds as a parameter or a buffer."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where, self.listed, self.named = where, [TABLE.clone()], {"scale": TABLE.clone()}
        self.layers = nn.ModuleList([nn.Linear(6, 16), nn.Linear(16, 3)])

    def forward(self, x: Tensor) -> Tensor:
        if self.where == "made":
            scale = torch.tensor([1.0, 2.0] * 8, dtype=x.dtype)
        else:
            scale = {"listed": self.listed[0], "named": self.named["scale"], "global": TABLE}[self.where]
        return self.layers[1](self.layers[0](x).relu() * scale)


@pytest.mark.parametrize("where", ["listed", "named", "global", "made"])
def test_tensors_that_are_neither_parameters_nor_buffers(where: str) -> None:
    torch.manual_seed(0)
    model, x = Scaled(where).double().eval(), torch.randn(3, 6, dtype=torch.float64)
    graph = sc.trace(model, x)
    plan = sc.Uniform(ratio=0.25).allocate(graph, sc.score(graph, None, "magnitude"))
    words = r"neither, which forward\(\) makes or takes from a list.* Register it with register_buffer\."
    with pytest.raises(sc.ApplyError, match=words) as caught:
        sc.apply(model, plan, "module", graph=graph)
    assert "lifted" not in str(caught.value)
    assert sc.record_of(sc.apply(model, plan, graph=graph)).form == "graph"


class Chunked(nn.Module):
    """Pairs of steps, counted by a tensor, as Longformer's windows are."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        pairs = torch.div(torch.tensor(x.shape[1]), 2, rounding_mode="trunc")
        x = x.view(len(x), pairs, 2, x.shape[-1]).amax(2)
        h = self.first(x).relu()
        return self.last(h.view(len(x), pairs, h.shape[-1]))


def test_a_tensor_that_is_a_size() -> None:
    torch.manual_seed(0)
    model, x = Chunked().double().eval(), torch.randn(3, 4, 6, dtype=torch.float64)
    graph = sc.trace(model, x)
    plan = sc.Uniform(ratio=0.25).allocate(graph, sc.score(graph, None, "magnitude"))
    small = sc.apply(model, plan, "module", graph=graph)
    assert small.first.weight.shape == (12, 6)
    assert sc.verify(model, small, plan).proven
