"""Effective Model Pruning of units: what it keeps, and the bound on what it retains."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import minimize

import secateur as sc
from secateur.allocators import EMP, Budget, Limits, retained_bound
from secateur.allocators.effective_size import effective_number, effective_size
from secateur.errors import SettingError
from tests.allocators.fake import FakeGraph, random_scores, reference_order


def top(omega: NDArray[np.float64], k: int) -> float:
    return float(np.sort(omega)[::-1][:k].sum())


def attack(size: int, effective: float, k: int, seed: int) -> float:
    """The lowest sum of the k largest that a solver finds, among vectors of this effective number."""
    rng = np.random.default_rng(seed)
    start = np.sort(rng.dirichlet(np.full(size, rng.choice([0.1, 0.5, 3.0]))))[::-1]
    falling = np.eye(size)[:-1] - np.eye(size)[1:]  # sorted, so that the sum is smooth
    found = minimize(
        lambda w: w[:k].sum(),
        start,
        jac=lambda w: (np.arange(size) < k).astype(float),
        method="SLSQP",
        bounds=[(0, 1)] * size,
        constraints=[
            {"type": "eq", "fun": lambda w: w.sum() - 1, "jac": lambda w: np.ones(size)},
            {"type": "eq", "fun": lambda w: (w @ w) * effective - 1, "jac": lambda w: 2 * effective * w},
            {"type": "ineq", "fun": lambda w: falling @ w, "jac": lambda w: falling},
        ],
        options={"ftol": 1e-14, "maxiter": 300},
    )
    w = found.x
    feasible = abs(w.sum() - 1) < 1e-9 and abs((w @ w) * effective - 1) < 1e-9 and w.min() > -1e-9
    return top(w, k) if feasible else math.inf


CASES = [
    (6, 2.5, 2),
    (6, 4.0, 4),
    (8, 3.3, 1),
    (8, 5.5, 3),
    (10, 9.2, 9),
    (10, 9.2, 4),
    (5, 1.4, 1),
    (7, 3.0, 5),
]


@pytest.mark.parametrize(("size", "effective", "k"), CASES)
def test_an_adversary_reaches_the_bound_and_never_beats_it(size: int, effective: float, k: int) -> None:
    bound = float(retained_bound(size, effective, k))
    found = [attack(size, effective, k, seed) for seed in range(12)]
    assert min(found) >= bound - 1e-8
    assert min(found) <= bound + 1e-6


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 30), st.integers(0, 10**6), st.floats(0.05, 4))
def test_no_random_scores_fall_below_the_bound(size: int, seed: int, spread: float) -> None:
    omega = np.random.default_rng(seed).gamma(spread, size=size) + 1e-300
    omega /= omega.sum()
    effective = float(effective_number(omega))
    for k in range(1, size + 1):
        assert top(omega, k) >= float(retained_bound(size, effective, k)) - 1e-12


@pytest.mark.parametrize("size", [2, 5, 12])
def test_the_bound_is_attained_by_two_levels(size: int) -> None:
    """A literal search over every vector of one level, a second level, and zeros."""
    for effective in np.linspace(1, size, 17):
        for k in range(1, size + 1):
            best = math.inf
            for m in range(1, math.floor(effective) + 1):
                for n in range(math.ceil(effective), size + 1):
                    first, second = np.zeros(size), np.zeros(size)
                    first[:m], second[:n] = 1 / m, 1 / n
                    low, high = 0.0, 1.0  # the share at which the effective number fits, by bisection
                    for _ in range(60):
                        mid = (low + high) / 2
                        w = mid * first + (1 - mid) * second
                        low, high = (mid, high) if (w @ w) * effective < 1 else (low, mid)
                    best = min(best, top(high * first + (1 - high) * second, k))
            assert float(retained_bound(size, effective, k)) == pytest.approx(best, abs=1e-7)


def kept(plan: Any) -> dict[str, int]:
    return {group.name: group.kept for group in plan.groups}


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=4),
    st.integers(0, 10**6),
    st.floats(0.05, 1.6),
    st.booleans(),
)
def test_each_layer_keeps_its_effective_size(sizes: list[int], seed: int, beta: float, ties: bool) -> None:
    graph: Any = FakeGraph(sizes)
    scores = random_scores(graph, seed, ties=ties)
    limits = Limits(max_ratio=1 - 1e-9)
    plan = EMP(beta).allocate(graph, scores, limits=limits)
    for group in plan.groups:
        values = scores["magnitude"][group.name]
        expected = effective_size(values, beta)
        assert group.kept == expected
        assert list(group.removed) == sorted(reference_order(values)[: group.size - expected])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=4), st.integers(0, 10**6), st.floats(0.05, 1.6))
def test_the_model_keeps_its_effective_size(sizes: list[int], seed: int, beta: float) -> None:
    graph: Any = FakeGraph(sizes)
    scores = random_scores(graph, seed)
    plan = EMP(beta, scope="model").allocate(graph, scores, limits=Limits(max_ratio=1 - 1e-9))
    whole = np.concatenate(list(scores["magnitude"].values()))
    least = np.sort(whole)[::-1][: effective_size(whole, beta)].min()
    for group in plan.groups:
        values = scores["magnitude"][group.name]
        assert group.kept == max(1, int((values >= least).sum()))  # limits leave one in each


def test_equal_scores_lose_nothing_at_one_and_the_same_share_below() -> None:
    graph: Any = FakeGraph([10, 20])
    scores = {"magnitude": {"layer0": np.full(10, 0.3), "layer1": np.full(20, 7.0)}}
    assert kept(EMP().allocate(graph, scores)) == {"layer0": 10, "layer1": 20}
    assert kept(EMP(0.3).allocate(graph, scores)) == {"layer0": 3, "layer1": 6}
    zero = {"magnitude": {"layer0": np.zeros(10), "layer1": np.zeros(20)}}
    for scope in ("layer", "model"):
        plan = EMP(scope=scope).allocate(graph, zero)  # type: ignore[arg-type]
        assert kept(plan) == {"layer0": 10, "layer1": 20}
        assert plan.certificates["whole"]["mass"] is None  # type: ignore[index, call-overload]


@pytest.mark.parametrize("scope", ["layer", "model"])
@pytest.mark.parametrize("seed", range(4))
def test_a_budget_solves_beta(scope: Any, seed: int) -> None:
    graph: Any = FakeGraph([30, 20, 10])
    scores = random_scores(graph, seed)
    rule = EMP(scope=scope)
    plan = rule.allocate(graph, scores, Budget(params=0.4, spend=False))
    beta: Any = plan.settings["beta"]
    assert plan.predicted.params <= 0.4 * plan.dense.params
    # The solved β alone gives the same plan; one of another last digit is over the budget.
    again = EMP(beta, scope=scope).allocate(graph, scores)
    assert kept(again) == kept(plan)
    more = EMP(beta * (1 + 3e-6), scope=scope).allocate(graph, scores)
    assert more.predicted.params > 0.4 * plan.dense.params


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(2, 25), min_size=1, max_size=3),
    st.integers(0, 10**6),
    st.floats(0.1, 1.2),
    st.integers(1, 4),
    st.sampled_from(["layer", "model"]),
)
def test_the_certificate_holds(sizes: list[int], seed: int, beta: float, round_to: int, scope: Any) -> None:
    graph: Any = FakeGraph(sizes)
    scores = random_scores(graph, seed)
    rule, limits = EMP(beta, scope), Limits(round_to=round_to)
    found: Any = rule.certificates(graph, scores, limits, rule.decide(graph, scores, None, limits))
    entries = found["groups"] if scope == "layer" else {"whole": found["whole"]}
    masses = 0.0
    for entry in entries.values():
        assert entry["kept"] >= entry["allowed"]
        assert entry["mass"] >= entry["bound"] - 1e-12
        one = retained_bound(entry["units"], entry["effective"], entry["allowed"])
        assert entry["bound"] == pytest.approx(float(one))
    total = sum(values.sum() for values in scores["magnitude"].values())
    for name, values in scores["magnitude"].items():
        masses += found["groups"][name]["mass"] * values.sum() / total
    assert found["whole"]["mass"] == pytest.approx(masses)


def test_the_certificate_under_a_budget() -> None:
    graph: Any = FakeGraph([30, 20])
    scores = random_scores(graph, 3)
    found: Any = EMP().allocate(graph, scores, Budget(macs=0.3)).certificates
    assert found["beta"] < 1
    for entry in found["groups"].values():
        assert entry["bound"] <= entry["mass"] < 1
    nothing: Any = EMP().allocate(graph, scores, Budget(macs=0.9999999)).certificates
    assert nothing["whole"]["mass"] <= 1


def test_bad_settings() -> None:
    graph: Any = FakeGraph([4])
    bad: Any
    for bad in (0, -1, math.nan, "1", None):
        with pytest.raises(SettingError, match="EMP: expected beta to be a number above 0"):
            EMP(bad)
    with pytest.raises(SettingError, match="EMP: expected scope to be 'model', 'layer' or 'row', got 'all'"):
        EMP(scope="all")  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="expected single weights for scope 'row', got the units"):
        EMP(scope="row").allocate(graph, random_scores(graph, 0))


class Attends(torch.nn.Module):
    """Channels, four heads, and neurons."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = torch.nn.Conv2d(3, 8, 2, stride=2)
        self.attend = torch.nn.MultiheadAttention(8, 4, batch_first=True)
        self.up, self.down = torch.nn.Linear(8, 12), torch.nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, 3, 8, 8] to [batch, 5]."""
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = self.attend(x, x, x, need_weights=False)[0].mean(1)
        return self.down(torch.relu(self.up(x)))


def test_channels_heads_and_neurons_of_a_network() -> None:
    torch.manual_seed(0)
    model = Attends().double().eval()
    with torch.no_grad():  # of the heads one is large, so of the four about one is there
        model.attend.out_proj.weight[:, :6] *= 0.01
        model.attend.in_proj_weight.view(3, 8, 8)[:, :6] *= 0.01
    data = [(torch.randn(6, 3, 8, 8).double(), torch.arange(6) % 5) for _ in range(5)]
    result = sc.prune(model, data, None, "emp", repair=None, measure_latency=False, progress=False)
    sizes = {group.name: (group.size, group.kept) for group in result.plan.groups}  # type: ignore[union-attr]
    assert sorted(size for size, _ in sizes.values()) == [4, 8, 8, 12]
    for name, (size, count) in sizes.items():
        assert count == effective_size(result.scores["magnitude"][name])
        assert (count == 1) == (size == 4)
    found: Any = result.plan.certificates
    assert all(entry["bound"] <= entry["mass"] <= 1 for entry in found["groups"].values())
