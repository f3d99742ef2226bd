"""Every granularity, rule, signal and repair works on a CUDA device; see `tests.cuda.test_cuda`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import secateur as sc
from secateur.pipeline.options import TARGETS
from secateur.repairs.methods import REPAIRS
from tests.cuda.test_cuda import DEVICE, exact, pytestmark, there
from tests.report.test_every import BUDGETS, DECIDED, NETWORKS, REFUSED, SCORED, SET, TOLERANCE, network

__all__ = ["exact", "pytestmark"]  # for all tests here


def pruned(granularity: Any, budget: Any = None, *, data_on_cpu: bool = False, **asked: Any) -> sc.Plan:
    """The plan for a model on the device; the pruned one is there too, and runs."""
    torch.manual_seed(0)
    model, data = NETWORKS.get(granularity, network)()
    found = sc.prune(model.to(DEVICE), data if data_on_cpu else there(data), budget, granularity=granularity,
                     measure_latency=False, progress=False, **asked)  # fmt: skip
    assert {t.device.type for t in found.model.state_dict().values()} == {DEVICE.type}
    assert found.model(data[0][0].to(DEVICE)).isfinite().all()
    return found.plan


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
def test_every_target_with_data_on_either_side(granularity: str) -> None:
    plans = [pruned(granularity, BUDGETS[granularity], data_on_cpu=there) for there in (False, True)]
    assert plans[0].to_json() == plans[1].to_json()
