from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from secateur.errors import SettingError
from secateur.graph.trace import trace
from secateur.signals import GeometricMedian, score
from tests.helpers.models import TOPOLOGIES, build
from tests.signals import literal


def distances(rows: dict[int, NDArray[np.float64]]) -> dict[int, float]:
    return {
        unit: sum(float(np.sqrt(((row - other) ** 2).sum())) for other in rows.values())
        for unit, row in rows.items()
    }


@pytest.mark.parametrize("how", ["mean", "max"])
@pytest.mark.parametrize(
    ("name", "group", "tensors"),
    [
        ("plain", "2", [("2.weight", 0)]),
        ("residual", "stem.0", [("stem.0.weight", 0), ("outer1.weight", 0)]),
        ("gated", "first", [("first.weight", 0)]),
        ("lstm", "recurrent", [("recurrent.weight_ih_l0", 0), ("recurrent.weight_hh_l0", 0)]),
    ],
)
def test_equals_the_formula(name: str, group: str, tensors: list[tuple[str, int]], how) -> None:
    model = build(name)
    graph = trace(model, TOPOLOGIES[name].inputs(2, torch.float64))
    expected = literal.of_tensors(model, graph[group], tensors, distances, how)
    found = score(graph, signals=GeometricMedian(combine=how))["geometric_median"][group]
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_where_the_filters_lie_does_not_matter_and_copies_come_first() -> None:
    net = nn.Sequential(nn.Linear(2, 5, bias=False), nn.ReLU(), nn.Linear(5, 2)).double()
    with torch.no_grad():
        # Two copies in the middle of three that are spread around them: the copies can be replaced.
        net[0].weight.copy_(torch.tensor([[0.0, 0.0], [3.0, 0.0], [-1.5, 2.6], [-1.5, -2.6], [0.0, 0.0]]))
    graph = trace(net, torch.randn(2, 2, dtype=torch.float64))
    before = score(graph, signals="geometric_median")["geometric_median"]["0"]
    assert before[0] == before[4] < before[1:4].min()
    with torch.no_grad():
        net[0].weight.add_(1e6)
    after = score(graph, signals="geometric_median")["geometric_median"]["0"]
    np.testing.assert_allclose(after, before, rtol=1e-9)


def test_settings() -> None:
    with pytest.raises(SettingError, match="geometric_median: expected combine"):
        GeometricMedian(combine="all")  # type: ignore[arg-type]
