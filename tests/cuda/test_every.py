"""Every granularity, rule, signal and repair works on a CUDA device; see `tests.cuda.test_cuda`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import secateur as sc
from secateur.pipeline.asked import TARGETS
from secateur.repairs.methods import REPAIRS
from tests.cuda.test_cuda import DEVICE, exact, there
from tests.report.test_every import BUDGETS, DECIDED, NETWORKS, REFUSED, SCORED, SET, TOLERANCE, network

__all__ = ["exact"]  # a fixture of all tests here
pytestmark = pytest.mark.cuda


def pruned(granularity: Any, budget: Any = None, **asked: Any) -> sc.Result:
    """A model on the device, pruned with data that wait on the CPU, and with the same on the device."""
    results = []
    for move in (list, there):
        torch.manual_seed(0)
        model, data = NETWORKS.get(granularity, network)()
        found = sc.prune(model.to(DEVICE), move(data), budget, granularity=granularity, measure_latency=False,
                         progress=False, **asked)  # fmt: skip
        assert {t.device.type for t in found.model.state_dict().values()} == {DEVICE.type}
        assert found.model(data[0][0].to(DEVICE)).isfinite().all()
        results.append(found)
    first, second = (result.plan.to_json() for result in results)
    assert first == second
    return results[0]


@pytest.mark.parametrize(("granularity", "name"), [each for each in DECIDED if each not in REFUSED])
def test_every_rule(granularity: str, name: str) -> None:
    rule: Any = SET[granularity] if name == "ratios" else name
    rule = TOLERANCE if (granularity, name) == ("unit+expert", "tod") else rule
    pruned(granularity, BUDGETS[granularity], allocator=rule, repair=None)


@pytest.mark.parametrize(("granularity", "name"), SCORED)
def test_every_signal(granularity: str, name: str) -> None:
    pruned(granularity, allocator=sc.Uniform(ratio=0.25, removal=name), repair=None)


@pytest.mark.parametrize("name", REPAIRS)
def test_every_repair(name: str) -> None:
    pruned("unit", allocator=sc.Uniform(ratio=0.25, removal="magnitude"), repair=name)


@pytest.mark.parametrize("granularity", TARGETS)
def test_every_target(granularity: str) -> None:
    pruned(granularity, BUDGETS[granularity])
