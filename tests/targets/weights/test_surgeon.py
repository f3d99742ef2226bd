"""The second-order update, against the optimal brain surgeon step by step."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from secateur.allocators import Budget
from secateur.errors import SettingError
from secateur.targets.weights import surgeon
from secateur.targets.weights.apply import apply
from secateur.targets.weights.surgeon import update
from tests.targets.weights.nets import allocate, score, traced


def literal(weight: Any, keep: Any, hessian: Any) -> Any:
    """Each row by itself; before each column the inverse of what is left of H, anew."""
    found = weight.copy()
    for row, kept in zip(found, keep, strict=True):
        for j in range(len(row)):
            if not kept[j]:
                inverse = np.linalg.inv(hessian[j:, j:])
                row[j:] -= row[j] / inverse[0, 0] * inverse[0]
                row[j] = 0.0
    return found


@pytest.mark.parametrize("seed", range(4))
def test_equals_the_optimal_brain_surgeon(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((40, 9)) @ rng.standard_normal((9, 9))
    weight, keep = rng.standard_normal((5, 9)), rng.random((5, 9)) > 0.5
    keep[0], keep[1] = True, False
    hessian = x.T @ x + 0.1 * np.eye(9)
    found = update(torch.tensor(weight), torch.tensor(keep), torch.tensor(hessian)).numpy()
    np.testing.assert_allclose(found, literal(weight, keep, hessian), rtol=1e-8, atol=1e-10)
    assert not found[~keep].any()
    np.testing.assert_array_equal(found[0], weight[0])


def test_one_masked_column_is_made_up_for_as_well_as_can_be() -> None:
    """With only the first column masked all others are free: least squares is the answer."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((50, 6)) @ rng.standard_normal((6, 6))
    weight, keep = rng.standard_normal((3, 6)), np.ones((3, 6), dtype=bool)
    keep[:, 0] = False
    found = update(torch.tensor(weight), torch.tensor(keep), torch.tensor(x.T @ x)).numpy()
    best = np.linalg.lstsq(x[:, 1:], x @ weight.T, rcond=None)[0].T
    np.testing.assert_allclose(found[:, 1:], best, rtol=1e-7)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 15), nn.Tanh(), nn.Linear(15, 4)
    ).double()


def test_a_network_layer_by_layer() -> None:
    model = network()
    mixed = torch.randn(12, 12, dtype=torch.float64)
    batches = [torch.randn(40, 12, dtype=torch.float64) @ mixed for _ in range(3)]
    plan = allocate(traced(model), score(model), "uniform", Budget(sparsity=0.5))
    small = apply(model, plan)
    done = copy.deepcopy(small)
    random = torch.get_rng_state()
    assert surgeon(done, model, plan, batches) == ("0.weight", "2.weight", "4.weight")
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(m._forward_pre_hooks for m in done.modules())
    x = torch.cat(batches)
    errors = [float((m(x) - model(x)).detach().square().sum()) for m in (small, done)]
    assert errors[1] < 0.7 * errors[0]
    for name, mask in plan.masks.items():
        assert not done.get_parameter(name)[torch.tensor(~mask)].any()
    # The second layer reads what the updated first one gives.
    hidden = torch.tanh(done[0](x)).detach()
    hessian = hidden.t() @ hidden
    hessian.diagonal().add_(1e-2 * hessian.diagonal().mean())
    expected = update(model[2].weight.detach(), torch.tensor(plan.masks["2.weight"]), hessian)
    torch.testing.assert_close(done[2].weight.detach(), expected)


def test_what_is_not_updated() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.Flatten(), nn.Linear(12, 4)).double()
    plan = allocate(traced(model), score(model), "uniform", Budget(sparsity=0.5))
    small = apply(model, plan)
    before = copy.deepcopy(small.state_dict())
    zeros = [torch.zeros(3, 2, 2, 2, dtype=torch.float64)]
    nn.init.zeros_(small[0].bias)
    assert surgeon(small, model, plan, zeros) == ()
    assert surgeon(small, model, plan, [torch.randn(3, 2, 2, 2, dtype=torch.float64)]) == ("2.weight",)
    assert torch.equal(small[0].weight, before["0.weight"])
    with pytest.raises(SettingError, match="surgeon: expected damping above 0, got 0"):
        surgeon(small, model, plan, zeros, damping=0)
