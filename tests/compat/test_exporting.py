"""Captures are the same with and without the shortcuts, and still say where each node comes from."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.export import Dim, export
from torch.fx import proxy
from torch.fx._lazy_graph_module import _get_graph_module_cls, _LazyGraphModule

from secateur.compat.exporting import quick_export
from secateur.graph.nodes import where


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        scaled = self.body(x) * 2
        return self.head(scaled)


def test_the_same_program_with_the_same_lines() -> None:
    """Captures are not strict: before PyTorch 2.7 a strict one needs the code that is left out here."""
    net, inputs = Net(), (torch.randn(5, 3),)
    shapes = ({0: Dim.AUTO},)
    original = proxy.CapturedTraceback
    plain = export(net, inputs, dynamic_shapes=shapes, strict=False)
    with quick_export():
        assert proxy.CapturedTraceback is not original
        assert _get_graph_module_cls() is _LazyGraphModule
        quick = export(net, inputs, dynamic_shapes=shapes, strict=False)
    assert proxy.CapturedTraceback is original
    assert [(n.op, str(n.target), str(n.args)) for n in quick.graph.nodes] == [
        (n.op, str(n.target), str(n.args)) for n in plain.graph.nodes
    ]
    lines = [where(node) for node in quick.graph.nodes]
    assert lines == [where(node) for node in plain.graph.nodes]
    assert any("test_exporting.py:" in line and "self.body(x) * 2" in line for line in lines)
    other = torch.randn(7, 3)
    assert torch.equal(quick.module()(other), net(other))
