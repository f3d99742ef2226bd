from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from secateur.errors import ScoreError
from secateur.graph.groups import Slice
from secateur.graph.trace import trace
from secateur.signals import Magnitude, score
from secateur.signals.slices import multipliers, unit_rows
from tests.helpers.models import build
from tests.helpers.traces import traced


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("residual", {"stem.1.weight", "inner1.1.weight", "norm1.weight", "inner2.1.weight", "norm2.weight"}),
        ("functional", {"scale"}),
        ("channels_last", {"gamma"}),
        ("layer_norm", {"1.weight"}),
        ("prelu", set()),  # a slope, not a scale
        ("expanded", set()),  # a parameter that is added
    ],
)
def test_what_multiplies(name: str, expected: set[str]) -> None:
    assert multipliers(traced(name)) == expected


def test_a_scale_behind_a_view_and_a_tied_one() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.out = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)
            self.one = nn.Parameter(torch.rand(4))
            self.two = self.one

        def forward(self, x):
            x = self.b(F.relu(self.a(x) * self.one.view(1, -1, 1, 1).exp()))
            return self.out(F.relu(x) * self.two.reshape(-1, 1, 1))

    assert multipliers(trace(Net(), torch.randn(2, 3, 4, 4))) == {"one"}


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_rows_of_units_with_several_and_with_fewer_positions(axis: int) -> None:
    x = torch.randn(5, 5, 5)
    piece = Slice("w", axis, "produce", np.array([0, 1, 3, 4]), np.array([2, 0, 2, 2]))
    rows, units = unit_rows(x, piece, 3)
    assert (rows.dtype, units.tolist()) == (torch.float64, [0, 2])
    single = torch.cat([x.select(axis, 1).flatten(), torch.zeros(50)])
    several = torch.cat([x.select(axis, k).flatten() for k in (0, 3, 4)])
    assert torch.equal(rows, torch.stack([single, several]).double())


def test_groups_without_such_weights_are_named() -> None:
    graph = trace(build("gated"), torch.randn(2, 6, dtype=torch.float64))
    with pytest.raises(
        ScoreError, match="magnitude, group first: expected parameters with roles scale, got none"
    ):
        score(graph, signals=Magnitude(roles=("scale",)))
