"""The search for the cheapest plan that is within: it finds it, and is seldom wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import secateur as sc
from secateur.allocators import Budget
from secateur.measure.quality import Damage
from secateur.pipeline.bounds.plans import Plans
from secateur.pipeline.bounds.quality import (
    STEP,
    Cheapest,
    cheapest,
    estimated_share,
    require_enough,
    shares_to_measure,
)

Drop = Callable[[float], float]


class Sized(nn.Module):
    """What stands for the model that keeps a share of the cost."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share


class FakeTarget:
    """Plans are the shares themselves, down to a floor."""

    budgets = (Budget(macs=0.5),)
    prunable = SimpleNamespace(cost=lambda: sc.Cost(params=1_000, macs=1_000_000))

    def __init__(self, floor: float = 0.0) -> None:
        data = SimpleNamespace(samples=lambda: 100, plain=None)
        self.floor = floor
        self.task = SimpleNamespace(seconds={}, data=data, fit=data, progress=False)
        self.graph = SimpleNamespace(device=torch.device("cpu"), static_batch=None)

    def allocate(self, rule: Any, scores: Any, budget: Budget) -> float:
        assert budget.macs is not None
        if budget.macs < self.floor:
            raise sc.UnreachableBudgetError("too small", smallest=self.floor)
        return float(budget.macs)

    def plan_and_apply(self, rule: Any, scores: Any, budget: Budget) -> tuple[nn.Module, float]:
        share = self.allocate(rule, scores, budget)
        return Sized(share), share

    def candidate(self, plan: float, data: Any) -> nn.Module:
        return Sized(plan)

    def repaired(self, small: nn.Module, plan: float) -> nn.Module:
        return small

    def same(self, one: float, other: float) -> bool:
        return one == other

    def shares(self, plan: float) -> tuple[float, float]:
        return plan, plan


class Known(Damage):
    """What endless data say."""

    def bound(self, confidence: float) -> float:
        return self.value

    def interval(self, confidence: float) -> tuple[float, float]:
        return self.value, self.value


class FakeGauge:
    """Draws what samples say of a model whose true drop is known; or knows it."""

    has_metric = False

    def __init__(self, drop: Drop, samples: int, seed: int | None) -> None:
        self.drop, self.samples = drop, samples
        self._draws = None if seed is None else np.random.default_rng(seed)

    def name(self, bound: str) -> str:
        return "accuracy"

    def __call__(self, model: Any, bound: str) -> Damage:
        true = self.drop(model.share)
        if self._draws is None:
            return Known(0.9, 0.9 - true, np.array([true]))
        worse, better = true + 0.02, 0.02
        counts = self._draws.multinomial(self.samples, [worse, better, 1 - worse - better])
        found = np.repeat([1.0, -1.0, 0.0], counts)
        return Damage(0.9, 0.9 - found.mean(), found)


def searched(
    drop: Drop, limit: float = 0.03, *, samples: int = 1000, seed: int | None = 0, floor: float = 0.0,
    rough: Drop | None = None, **bounds: Any,
) -> Cheapest:  # fmt: skip
    plans = Plans(FakeTarget(floor), None, None, Budget(accuracy_drop=limit, **bounds))  # type: ignore[arg-type]
    gauge: Any = FakeGauge(drop, samples, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("secateur.pipeline.bounds.quality.take_share", lambda data, share, whole: data)
        return cheapest(plans, gauge, lambda _: FakeGauge(rough or drop, samples, None), lambda what: None)


def falling(border: float) -> Drop:
    """A drop of 0.03 at the border, and more below."""
    return lambda share: min(0.5, 0.03 * (1 - share) / (1 - border))


@given(st.floats(0.1, 0.9))
def test_with_endless_data_it_is_the_cheapest_of_all_plans(border: float) -> None:
    found = searched(falling(border), seed=None)
    assert falling(border)(found.plan) <= 0.03
    every = [share for share in np.linspace(0.001, 0.999, 999) if falling(border)(share) <= 0.03]
    assert found.plan <= min(every) * (1 + 1.3 * STEP) + 0.01


@pytest.mark.parametrize("limit", [0.04])
def test_it_is_wrong_as_seldom_as_it_says(limit: float) -> None:
    """Also where the drop is not monotone, and where other data point to the wrong place."""

    def bumpy(share: float) -> float:
        return max(0.0, 0.1 * (1 - share) + 0.01 * math.sin(25 * share))

    def misled(share: float) -> float:
        return 0.5 * bumpy(share)

    wrong = done = 0
    for seed in range(60):
        try:
            found = searched(bumpy, limit, samples=1000, seed=seed, rough=misled)
        except sc.UnreachableBudgetError:
            continue
        done += 1
        wrong += bumpy(found.plan) > limit
    assert wrong <= 0.05 * 60 + 2 * math.sqrt(60 * 0.05)
    assert done > 20


def test_looks_go_down_and_end_with_the_first_that_is_not_confirmed() -> None:
    found = searched(falling(0.4))
    verdicts = [point.verdict for point in found.tried.points]
    assert verdicts[-2:] == ["chosen", "not confirmed"]
    assert set(verdicts[:-2]) == {"within"}
    shares = [point.share for point in found.tried.points]
    assert shares == sorted(shares, reverse=True)
    frontier = found.tried.frontier()
    assert (frontier.limit, frontier.samples, frontier.measure) == (0.03, 1000, "accuracy")
    chosen = next(point for point in frontier.points if point.verdict == "chosen")
    assert chosen.damage < chosen.most <= 0.03 < found.tried.points[-1].most


def test_what_no_plan_reaches_is_not_asked_for() -> None:
    found = searched(falling(0.01), floor=0.35, samples=20_000)
    assert found.plan == 0.35
    assert found.tried.points[-1].verdict == "chosen"


def test_other_bounds_hold_for_every_plan() -> None:
    found = searched(falling(0.2), macs=0.6, samples=4_000)
    assert all(point.share <= 0.6 for point in found.tried.points)
    assert found.plan < 0.6
    with pytest.raises(
        sc.UnreachableBudgetError, match=r"The first plan keeps 30\.0 % of the macs: measured"
    ):
        searched(falling(0.4), macs=0.3)


def test_too_few_to_confirm_says_how_many_would() -> None:
    message = r"got none\. The first plan keeps .*, on 1,000 samples\. About [\d,]+ held-out samples would"
    with pytest.raises(sc.UnreachableBudgetError, match=message) as caught:
        searched(lambda share: 0.002, 0.01)
    assert caught.value.smallest > 0.01
    with pytest.raises(sc.UnreachableBudgetError, match="Allow more, or repair better"):
        searched(lambda share: 0.05, 0.03)


def test_too_few_whatever_they_show_are_refused_before_anything_runs() -> None:
    gauge: Any = SimpleNamespace(samples=200)
    message = r"at least 299 held-out samples for accuracy_drop=0\.01 at 95 %, got 200: fewer cannot"
    with pytest.raises(sc.errors.BudgetError, match=message):
        require_enough(gauge, Budget(accuracy_drop=0.01), counted=True)
    require_enough(gauge, Budget(accuracy_drop=0.015), counted=True)
    require_enough(gauge, Budget(accuracy_drop=0.01), counted=False)
    with pytest.raises(sc.errors.BudgetError, match="at least 30 held-out samples for loss_rise"):
        require_enough(SimpleNamespace(samples=29), Budget(loss_rise=0.1), counted=True)  # type: ignore[arg-type]


@given(st.floats(0.02, 0.95), st.floats(0.3, 1.0))
def test_the_order_goes_down_from_what_is_allowed(place: float, most: float) -> None:
    place = min(place, most)
    shares = [share for share, _ in zip(shares_to_measure(place, most), range(200), strict=False)]
    assert all(a > b for a, b in pairwise(shares))
    assert all(0 < share <= most for share in shares)
    assert any(abs(share - place) <= STEP * place for share in shares)
    fine = [a - b for a, b in pairwise(shares) if place * 0.88 <= b and a <= place * (1 + 4 * STEP)]
    assert max(fine) <= STEP * place * 1.0001


def test_the_place_is_found_with_other_data() -> None:
    plans = Plans(FakeTarget(), None, None, Budget(accuracy_drop=0.03))  # type: ignore[arg-type]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("secateur.pipeline.bounds.quality.take_share", lambda data, share, whole: data)
        found = estimated_share(plans, 100, lambda _: FakeGauge(falling(0.4), 1, None), lambda what: None)
    assert 0.4 <= found <= 0.4 + STEP
