"""How much the errors of each group change the outputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.pipeline.auto.outputs import weighted_by_outputs
from secateur.targets.lowrank.factorise import factorise


class Apart(nn.Module):
    """Two layers whose outputs lie beside each other, one of them ten times as large."""

    def __init__(self) -> None:
        super().__init__()
        self.large, self.small = nn.Linear(12, 8), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([10 * self.large(x), self.small(x)], 1)


def test_a_relative_error_counts_by_what_it_changes() -> None:
    torch.manual_seed(0)
    model = Apart().double()
    data = [torch.randn(64, 12, dtype=torch.float64) for _ in range(8)]
    pairs = factorise(model, data, progress=False)
    graph: Any = sc.trace(pairs, data[0], granularity="rank")
    scores = sc.score(graph, data, "reconstruction", progress=False)
    found = weighted_by_outputs(sc.RepairAware(), graph, sc.Calibration.of(data, model=pairs), scores)
    large, small = (float(layer(torch.cat(data)).var(0).sum()) for layer in (model.large, model.small))
    ratio = found.factors["large.first"] / found.factors["small.first"]
    assert ratio == pytest.approx(100 * large / small, rel=0.4)
    assert found.factors["large.first"] * found.factors["small.first"] == pytest.approx(1.0)
    again = weighted_by_outputs(
        sc.RepairAware(factors={"large.first": 2.0}), graph, sc.Calibration.of(data, model=pairs), scores
    )
    assert again.factors["large.first"] == pytest.approx(2 * found.factors["large.first"])


def test_outputs_without_a_gradient_change_nothing() -> None:
    class Detached(Apart):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).detach()

    torch.manual_seed(0)
    data = [torch.randn(16, 12) for _ in range(4)]
    pairs = factorise(Detached(), data, progress=False)
    graph: Any = sc.trace(pairs, data[0], granularity="rank")
    scores = sc.score(graph, data, "reconstruction", progress=False)
    rule = sc.RepairAware()
    assert weighted_by_outputs(rule, graph, sc.Calibration.of(data, model=pairs), scores) is rule


def test_prune_weighs_errors_so() -> None:
    torch.manual_seed(0)
    data = [torch.randn(16, 12) for _ in range(4)]
    result = sc.prune(
        Apart(), data, sc.Budget(params=0.7), "repair_aware", "rank", None, measure_latency=False,
        progress=False,
    )  # fmt: skip
    assert set(result.plan.settings["factors"]) == {"large.first", "small.first"}  # type: ignore[arg-type]
    assert result.plan.ratios["large.first"] < result.plan.ratios["small.first"]
