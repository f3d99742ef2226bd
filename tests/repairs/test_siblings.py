"""Layers that read the same input are refitted from shared sums, as well as one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.repairs import sweep
from secateur.repairs.tasks import Task


class Late(nn.Module):
    """The second sibling goes into a sum with what the first one leads to."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.a = nn.Linear(6, 10), nn.Linear(10, 8)
        self.b, self.c = nn.Linear(8, 7), nn.Linear(10, 7)
        self.end = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(x).relu()
        y = self.b(self.a(x).relu()).relu()
        return self.end((y + self.c(x)).relu())


class Bottleneck(nn.Module):
    """The first convolution and that of the shortcut have equal settings."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv1, self.conv2 = nn.Conv2d(8, 6, 1, bias=False), nn.Conv2d(6, 6, 3, padding=1)
        self.conv3, self.down = nn.Conv2d(6, 12, 1), nn.Conv2d(8, 12, 1)
        self.relu, self.end = nn.ReLU(inplace), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.stem(x)))
        y = self.conv3(self.relu(self.conv2(self.relu(self.conv1(x)))))
        return self.end(self.relu(y + self.down(x)).mean((2, 3)))


class Attention(nn.Module):
    """Queries, keys and values, of which only some have a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.back = nn.Linear(8, 20), nn.Linear(20, 8)
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 8)
        self.out, self.end = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.back(self.up(x).relu())
        q, k, v = (f(x).unflatten(-1, (2, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.end((x + self.out(y)).mean(1))


NETS: dict[str, Any] = {
    "late": (Late, (40, 6)),
    "bottleneck": (lambda: Bottleneck(False), (8, 3, 6, 6)),
    "bottleneck in place": (lambda: Bottleneck(True), (8, 3, 6, 6)),
    "attention": (Attention, (8, 5, 8)),
}


@pytest.mark.parametrize("name", list(NETS))
def test_siblings_are_refitted_as_one_by_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    make, shape = NETS[name]
    net = make().eval()
    data = [torch.randn(shape) for _ in range(8)]
    graph = sc.trace(net, data[0])
    plan = sc.Uniform(ratio=0.4).allocate(graph, sc.score(graph, None, "magnitude"))
    together: list[int] = []
    collect = sweep.siblings_among

    def counted(found: Sequence[Task], pair: Any) -> list[list[Task]]:
        groups = collect(found, pair)
        together.append(max(map(len, groups)))
        return groups

    def one_by_one(found: Sequence[Task], pair: Any) -> list[list[Task]]:
        return [[task] for task in found]

    states = []
    for way in (counted, one_by_one):
        monkeypatch.setattr(sweep, "siblings_among", way)
        small = sc.apply(net, plan, graph=graph)
        assert sweep.sweep("reconstruct", small, graph, sc.Calibration.of(data))
        states.append(small.state_dict())
    for key, tensor in states[0].items():
        torch.testing.assert_close(tensor, states[1][key], rtol=1e-3, atol=1e-4, msg=key)
    wanted = {"late": [1], "bottleneck": [1], "bottleneck in place": [], "attention": [3]}[name]
    assert together == wanted
