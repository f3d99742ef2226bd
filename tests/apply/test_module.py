"""Smaller copies of modules."""

from __future__ import annotations

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
