from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.allocators import Budget
from secateur.allocators.budget import solve
from secateur.errors import BudgetError, UnreachableBudgetError
from secateur.measure.cost import Cost

DENSE = Cost(params=1_000, macs=100_000)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({}, "expected macs or params, got neither"),
        ({"macs": 0.0}, r"budget: expected macs .* got 0\.0"),
        ({"macs": 1.0}, r"macs .* got 1\.0"),
        ({"macs": 1.5}, r"macs .* got 1\.5"),
        ({"params": 0}, r"params .* got 0"),
        ({"params": -3}, r"params .* got -3"),
        ({"params": True}, r"params .* got True"),
        ({"macs": math.nan}, r"macs .* got nan"),
        ({"macs": math.inf}, r"macs .* got inf"),
        ({"macs": "0.5"}, r"macs .* got '0\.5'"),
        ({"macs": 0.5, "params": 2.0}, r"params .* got 2\.0"),
    ],
)
def test_no_valid_budget(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        Budget(**setting)


def test_targets() -> None:
    assert Budget(macs=0.25).targets(DENSE) == {"macs": 25_000}
    assert Budget(params=123, macs=0.75).targets(DENSE) == {"macs": 75_000, "params": 123}
    assert Budget(params=np.int64(7), macs=np.float32(0.5)).as_settings() == {"macs": 0.5, "params": 7}  # type: ignore[arg-type]
    assert Budget(macs=0.5).targets(Cost(params=0, macs=0)) == {"macs": 0}


@given(st.integers(1, 99), st.integers(1, 10**13))
def test_a_fraction_is_the_one_that_was_written(percent: int, whole: int) -> None:
    target = Budget(macs=percent / 100).targets(Cost(params=1, macs=whole))["macs"]
    assert target == math.floor(Fraction(percent, 100) * whole)


@given(st.data(), st.integers(2, 10**13))
def test_a_costs_own_fraction_admits_it(data: st.DataObject, whole: int) -> None:
    cost = data.draw(st.integers(1, whole - 1))
    dense = Cost(params=1, macs=whole)
    assert Budget(macs=cost / whole).met(Cost(params=1, macs=cost), dense)
    assert not Budget(macs=cost / whole).met(Cost(params=1, macs=cost + 1), dense)


def test_both_have_to_hold() -> None:
    both = Budget(macs=0.5, params=100)
    assert both.met(Cost(params=100, macs=50_000), DENSE)
    assert not both.met(Cost(params=101, macs=50_000), DENSE)
    assert not both.met(Cost(params=100, macs=50_001), DENSE)


falling = st.lists(st.integers(0, 30), min_size=1, max_size=40).map(lambda v: sorted(v, reverse=True))


@given(falling, st.integers(1, 30))
def test_bisection_finds_the_first_step_within(costs: list[int], target: int) -> None:
    asked: list[int] = []

    def cost_at(step: int) -> Cost:
        asked.append(step)
        return Cost(params=1, macs=costs[step])

    within = [step for step, cost in enumerate(costs) if cost <= target]
    dense = Cost(params=1, macs=100)
    if within:
        assert solve(Budget(macs=target), dense, len(costs), cost_at) == min(within)
    else:
        with pytest.raises(UnreachableBudgetError) as caught:
            solve(Budget(macs=target), dense, len(costs), cost_at)
        assert caught.value.smallest == costs[-1]
    assert len(asked) <= 2 + math.log2(len(costs))


def test_unreachable_says_what_is() -> None:
    def cost_at(step: int) -> Cost:
        return [DENSE, Cost(params=900, macs=33_337)][step]

    message = (
        "budget: expected at most 25,000 macs (25.00% of 100,000), got 33,337 (33.34%) as the smallest that "
        "the allocator reaches. Ask for at least macs=0.3334, or loosen the limits"
    )
    with pytest.raises(UnreachableBudgetError, match=re.escape(message)) as caught:
        solve(Budget(macs=0.25), DENSE, 2, cost_at)
    assert caught.value.smallest == 0.33337
    assert solve(Budget(macs=caught.value.smallest), DENSE, 2, cost_at) == 1
    assert solve(Budget(macs=0.3334), DENSE, 2, cost_at) == 1

    # In the budget's own terms, and of the entry that fails.
    with pytest.raises(UnreachableBudgetError, match=r"at most 899 params .* at least params=900,") as caught:
        solve(Budget(macs=0.5, params=899), DENSE, 2, cost_at)
    assert caught.value.smallest == 900
    with pytest.raises(UnreachableBudgetError, match=r"at least macs=0\.3334, params=900,"):
        solve(Budget(macs=0.25, params=899), DENSE, 2, cost_at)
