"""The whole pipeline for single weights."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

import secateur as sc
from secateur.allocators import Budget, Repairability
from secateur.errors import SettingError
from secateur.targets.weights.apply import apply
from tests.targets.weights.nets import data, net, prune


@pytest.mark.parametrize("allocator", ["emp", "repairability", sc.Uniform(removal="wanda")])
def test_from_a_model_to_a_report(allocator: Any) -> None:
    model, batches = net(), data(5, 8)
    before = copy.deepcopy(model.state_dict())
    result = prune(model, batches, Budget(sparsity=0.5), allocator, "variance", progress=False)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert result.plan.sparsity == pytest.approx(0.5, abs=0.001)
    for name, mask in result.plan.masks.items():
        assert not result.model.get_parameter(name)[torch.tensor(~mask)].any()
    dense, pruned = result.report.figures[:2]
    assert dense.params - pruned.params == sum(int((~mask).sum()) for mask in result.plan.masks.values())
    assert dense.macs == pruned.macs
    assert [layer.kept for layer in result.report.layers] == [
        int(m.sum()) for m in result.plan.masks.values()
    ]
    shown = str(result.report)
    assert "exactly the masked weights at zero" in shown
    assert "the dense model's shapes" in shown
    assert "single weights are zero, shapes and MACs are the dense model's" in " ".join(shown.split())
    again = prune(model, batches, Budget(sparsity=0.5), allocator, "variance", progress=False)
    assert again.plan.to_json() == result.plan.to_json()
    assert all(torch.equal(t, again.model.state_dict()[n]) for n, t in result.model.state_dict().items())


def test_curves_of_repairability_are_measured_unless_given() -> None:
    model, batches = net(), data(5, 8)
    first = prune(model, batches, Budget(sparsity=0.5), Repairability(removal="wanda"), None, progress=False)
    residual: Any = first.plan.certificates["residual"]
    assert set(residual) <= {"conv.weight", "grouped.weight", "line.weight", "fc.weight"}
    assert all(0 < value < 2 for value in residual.values())
    assert first.plan.settings["removal"] == "wanda"


def test_emp_alone_decides_without_a_budget() -> None:
    result = prune(net(), data(5, 8), None, "emp", None, progress=False)
    for name, values in result.scores["magnitude"].items():
        assert result.plan.masks[name].sum() == sc_effective(values)


def sc_effective(values: Any) -> int:
    omega = values / values.sum()
    return int(np.floor(1 / (omega**2).sum()))


def test_rules_that_read_units_are_refused() -> None:
    with pytest.raises(SettingError, match=r"expected a rule that reads magnitude, .*, got 'l1'"):
        prune(net(), data(), Budget(sparsity=0.5), sc.Uniform(removal="l1"))
    with pytest.raises(SettingError, match="got 'wasserstein'"):
        prune(net(), data(), Budget(sparsity=0.5), "tod")


def test_the_surgeon_by_name() -> None:
    model, batches = net(), [x for x, _ in data(6, 60)]  # without labels the distance to the dense judges
    result = prune(model, batches, Budget(sparsity=0.6), "erk", "surgeon", progress=False)
    (tried,) = result.report.repairs
    assert (tried["method"], tried["kept"], tried["updated"]) == ("surgeon", True, ["fc.weight"])
    for name, mask in result.plan.masks.items():
        assert not result.model.get_parameter(name)[torch.tensor(~mask)].any()
    assert not torch.equal(result.model.fc.weight, apply(model, result.plan).fc.weight)
    both = prune(model, batches, Budget(sparsity=0.6), "erk", ["surgeon", "variance"], progress=False)
    assert [entry["method"] for entry in both.report.repairs] == ["surgeon", "variance"]
    with pytest.raises(SettingError, match="polish, surgeon, got 'surgery'"):
        prune(model, batches, Budget(sparsity=0.6), "erk", "surgery", progress=False)
    with pytest.raises(SettingError, match=r"names among .*, polish, got 'surgeon'"):
        sc.prune(model, batches, sc.Budget(macs=0.6), repair="surgeon", progress=False)
