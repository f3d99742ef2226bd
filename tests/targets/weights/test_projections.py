"""Which layers are shortcuts, whatever their names and the order of the branches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.allocators import Budget, Repairability
from secateur.targets.weights import distortions, projections
from tests.targets.weights.nets import allocate, score, traced
from tests.zoo.importing import import_torchvision


class Blocks(nn.Module):
    """Two residual blocks of bottlenecks, whose last layer is as small as the projection beside it."""

    def __init__(self, *, first: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.a = nn.ModuleList(self._layers(4, 6) for _ in range(1))
        self.b = nn.ModuleList(self._layers(6, 8) for _ in range(1))
        self.same = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 3)
        self.first = first

    @staticmethod
    def _layers(inputs: int, outputs: int) -> nn.ModuleList:
        main = nn.Sequential(
            nn.Conv2d(inputs, 5, 1), nn.ReLU(), nn.Conv2d(5, 5, 3, 2, 1), nn.ReLU(), nn.Conv2d(5, outputs, 1)
        )
        return nn.ModuleList([main, nn.Sequential(nn.Conv2d(inputs, outputs, 1, 2), nn.BatchNorm2d(outputs))])

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 3, 8, 8] to [batch, 3]."""
        x = torch.relu(self.stem(x))
        for main, beside in (*self.a, *self.b):
            if self.first:
                shortcut = beside(x)
                x = torch.relu(main(x) + shortcut)
            else:
                x = torch.relu(main(x).add_(beside(x)))
        x = x + self.same(x)  # beside the stream itself: a branch, no projection
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("first", [False, True])
def test_shortcuts_are_found_by_structure(first: bool) -> None:
    torch.manual_seed(0)
    model = Blocks(first=first).eval()
    found = projections(sc.trace(model, torch.randn(2, 3, 8, 8)))
    assert found == ("a.0.1.0.weight", "b.0.1.0.weight")


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v2"])
def test_of_known_networks(name: str) -> None:
    library: Any = import_torchvision()
    if library is None:
        pytest.skip("torchvision is not installed")
    model = getattr(library.models, name)(weights=None).eval()
    found = projections(sc.trace(model, torch.randn(2, 3, 64, 64)))
    expected = [n for n, p in model.named_parameters() if "downsample" in n and p.ndim == 4]
    assert list(found) == expected


def test_forced_in_and_out() -> None:
    torch.manual_seed(0)
    model = Blocks(first=False).double().eval()
    graph = sc.trace(model, torch.randn(2, 3, 8, 8).double())
    data = [torch.randn(8, 3, 8, 8).double()]
    scores, weights = score(model), traced(model)
    curves = distortions(model, data, scores["magnitude"], progress=False)
    names = projections(graph)
    budget = Budget(sparsity=0.6)
    out = allocate(weights, scores, Repairability(curves, dense=names), budget)
    assert [out.sparsities[name] for name in names] == [0, 0]
    others = {name: curve for name, curve in curves.items() if name not in names}
    into = allocate(weights, scores, Repairability(others, along=names), budget)
    sizes = {group.name: group.size for group in weights.groups}
    lost = sum(round(into.sparsities[name] * sizes[name]) for name in others)
    share = lost / sum(sizes[name] for name in others)
    for name in names:
        assert into.sparsities[name] == pytest.approx(share, abs=1.01 / sizes[name] + 0.01)
    assert into.sparsity == out.sparsity == pytest.approx(0.6, abs=0.001)
    assert into.settings["along"] == list(names)
