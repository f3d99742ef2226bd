"""Relative repairability: what is measured, and what the rule makes of it."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from secateur.allocators import Budget, Distortion, Repairability
from secateur.errors import ScoreError, SettingError
from secateur.targets.weights.distortion import distortions
from tests.targets.weights.nets import allocate, data, net, score, traced

GRID = (0.0, 0.25, 0.5, 0.8, 0.9, 1.0)
MODEL = net()
WEIGHTS = traced(MODEL)
SCORES = score(MODEL)
INPUTS = [x for x, _ in data(3, 10)]
CURVES = distortions(MODEL, INPUTS, SCORES["magnitude"], grid=GRID, progress=False)


def literal(name: str, sparsity: float) -> tuple[float, float]:
    """Prune one layer alone, look at its outputs, and match each one's mean and variance."""
    path = name.removesuffix(".weight")
    seen: dict[str, Tensor] = {}

    def outputs(model: Any) -> Tensor:
        model = copy.deepcopy(model)
        model.get_submodule(path).register_forward_hook(lambda m, a, out: seen.update(out=out))
        with torch.no_grad():
            model(torch.cat(INPUTS))
        out = seen["out"]
        return out.movedim(1, 0).reshape(out.shape[1], -1)

    pruned = copy.deepcopy(MODEL)
    flat = pruned.get_parameter(name).data.view(-1)
    flat[torch.argsort(flat.abs())[: round(sparsity * len(flat))]] = 0
    y, z = outputs(MODEL), outputs(pruned)
    matched = torch.empty_like(y)
    for k in range(len(y)):
        spread = z[k].std(unbiased=False)
        scale = y[k].std(unbiased=False) / spread if spread > 1e-9 else 0.0
        matched[k] = (z[k] - z[k].mean()) * scale + y[k].mean()
    energy = y.square().sum()
    return float((z - y).square().sum() / energy), float((matched - y).square().sum() / energy)


@pytest.mark.parametrize("name", ["conv.weight", "grouped.weight", "line.weight", "fc.weight"])
def test_curves_equal_pruning_each_layer_alone(name: str) -> None:
    curve = CURVES[name]
    for k, sparsity in enumerate(GRID):
        raw, repaired = literal(name, sparsity)
        assert curve.raw[k] == pytest.approx(raw, abs=1e-9)
        assert curve.repaired[k] == pytest.approx(repaired, abs=1e-9)
        assert curve.ratio[k] == pytest.approx(repaired / raw if raw else 0.0, abs=1e-6)


def test_what_measuring_promises() -> None:
    model = copy.deepcopy(MODEL)
    before = copy.deepcopy(model.state_dict())
    other = distortions(model, [torch.cat(INPUTS)], SCORES["magnitude"], grid=GRID, progress=False)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())
    for name, curve in CURVES.items():  # however the samples are cut into batches
        np.testing.assert_allclose(other[name].repaired, curve.repaired, rtol=1e-9, atol=1e-12)
    with pytest.raises(ScoreError, match=r"expected 216 scores of 'conv\.weight'"):
        distortions(model, INPUTS, {}, grid=GRID)


def test_the_price_is_the_slope_of_the_convex_hull() -> None:
    s = np.linspace(0, 1, 101)
    square = Distortion(s, s, 3 * s**2)
    np.testing.assert_allclose(square.price(s), 2 * s, atol=1e-9)
    # A step has the hull's slopes: it never falls.
    step = Distortion(np.array([0.0, 0.4, 0.5, 1.0]), s[:4], np.array([0.0, 0.0, 0.9, 1.0]))
    price = step.price(s)
    assert (np.diff(price) >= 0).all()
    assert price[-1] > 0
    assert not Distortion(s, s, np.zeros(101)).price(s).any()


def test_the_sum_of_shares_is_least() -> None:
    """Convex curves, so that the optimum is where all prices agree; no exchange is better."""
    s = np.linspace(0, 1, 201)
    powers = dict(zip((g.name for g in WEIGHTS.groups), (2.0, 3.0, 5.0, 4.0), strict=True))
    curves = {name: Distortion(s, s, s**p) for name, p in powers.items()}
    plan = allocate(WEIGHTS, SCORES, Repairability(curves), Budget(sparsity=0.7))
    sizes = {g.name: g.size for g in WEIGHTS.groups}
    found = plan.sparsities

    def total(change: dict[str, int]) -> float:
        return sum((found[n] + change.get(n, 0) / sizes[n]) ** p for n, p in powers.items())

    for a in powers:
        for b in powers:
            if a != b:
                assert total({a: 6, b: -6}) > total({}) - 1e-4
    assert max(found.values()) - min(found.values()) > 0.1
    assert plan.sparsity == pytest.approx(0.7, abs=0.002)


def test_layers_that_repair_well_lose_more() -> None:
    s = np.linspace(0, 1, 51)
    easy, hard = Distortion(s, s**2, 0.1 * s**8), Distortion(s, s**2, 0.9 * s**2)
    curves = {g.name: hard for g in WEIGHTS.groups} | {"fc.weight": easy}
    plan = allocate(WEIGHTS, SCORES, Repairability(curves), Budget(sparsity=0.6))
    assert plan.sparsities["fc.weight"] == max(plan.sparsities.values())
    found: Any = plan.certificates["residual"]
    for name, value in found.items():
        assert value == pytest.approx(curves[name].residual(plan.sparsities[name]), rel=1e-3)


def test_layers_forced_out() -> None:
    plan = allocate(WEIGHTS, SCORES, Repairability(CURVES, dense=("conv.*",)), Budget(sparsity=0.5))
    assert plan.sparsities["conv.weight"] == 0
    assert plan.sparsity == pytest.approx(0.5, abs=0.01)
    with pytest.raises(
        SettingError, match="expected each pattern of dense to match a weight or a group, got 'down"
    ):
        allocate(WEIGHTS, SCORES, Repairability(CURVES, dense=("down*",)), Budget(sparsity=0.5))


def test_what_is_missing() -> None:
    with pytest.raises(SettingError, match=r"expected a curve of 'conv\.weight', got none"):
        allocate(WEIGHTS, SCORES, "repairability", Budget(sparsity=0.5))
    with pytest.raises(SettingError, match="Repairability: expected a budget, got none"):
        allocate(WEIGHTS, SCORES, Repairability(CURVES))
