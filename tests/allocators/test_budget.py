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


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"latency": 1.0}, r"latency to be a share .* got 1\.0"),
        ({"latency": "30"}, r"latency .* a time with its unit \(s, ms, us\), got '30'"),
        ({"latency": "-3 ms"}, "latency .* got '-3 ms'"),
        ({"latency": "30 min"}, "latency .* got '30 min'"),
        ({"memory": 0}, "memory .* got 0"),
        ({"memory": True}, "memory .* got True"),
        ({"memory": "512 MX"}, "memory .* got '512 MX'"),
        ({"memory": 1.5}, r"memory .* got 1\.5"),
        ({"accuracy_drop": 1}, "accuracy_drop to be a number above 0 and below 1, or a percentage, got 1"),
        ({"accuracy_drop": 0.0}, r"accuracy_drop .* got 0\.0"),
        (
            {"accuracy_drop": "1 point"},
            "accuracy_drop .* got '1 point'.* Write 0.01 or '1%' for one point",
        ),
        ({"loss_rise": math.inf}, "loss_rise to be a number above 0, or a percentage, got inf"),
        ({"perplexity_rise": -0.1}, r"perplexity_rise .* got -0\.1"),
        ({"memory": 0.5, "tokens": 0}, "tokens of at least 1, got 0"),
        ({"memory": 0.5, "batch": 1.0}, r"batch of at least 1, got 1\.0"),
        ({"macs": 0.5, "batch": 4}, "batch together with latency or memory, got it alone"),
        ({"latency": 0.5, "tokens": 4}, "tokens together with memory, got it alone"),
        ({"memory": 0.5, "backend": "compile"}, "backend together with latency, got it alone"),
        ({"latency": 0.5, "backend": "tvm"}, "backend to be one of eager, compile, onnxruntime, got 'tvm'"),
        ({"accuracy_drop": 0.1, "confidence": 1}, r"confidence in \[0\.5, 1\), got 1"),
        ({"macs": 0.5, "confidence": 0.9}, "confidence together with accuracy_drop or loss_rise"),
    ],
)
def test_no_valid_measured_bound(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        Budget(**setting)


def test_measured_bounds_as_people_write_them() -> None:
    assert Budget(latency="30 ms").as_settings() == {"latency": "30 ms"}
    assert Budget(latency="60%").latency == Budget(latency="0.6").latency == 0.6
    assert Budget(memory=" 1.5 GiB ").memory == "1.5 GiB"
    assert Budget(memory="60 %").memory == 0.6
    assert Budget(memory=1_000).memory == 1_000
    assert Budget(accuracy_drop="1%").accuracy_drop == Budget(accuracy_drop="0.01").accuracy_drop == 0.01
    assert Budget(perplexity_rise=1.5).perplexity_rise == 1.5
    both = Budget(accuracy_drop=0.03, macs=0.5, latency=0.9, backend="onnx", batch=1, spend=False)
    assert both.backend == "onnxruntime"
    assert both.measured == ("latency", "accuracy_drop")
    assert both.quality == ("accuracy_drop",)
    assert both.counted() == Budget(macs=0.5, spend=False)
    assert both.counted(macs=0.25, params=7) == Budget(macs=0.25, params=7, spend=False)
    assert both.as_settings() == {
        "macs": 0.5, "latency": 0.9, "accuracy_drop": 0.03, "batch": 1, "backend": "onnxruntime",
        "spend": False,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["latency", "memory", "accuracy_drop", "loss_rise", "perplexity_rise"])
def test_allocators_refuse_what_they_cannot_count(name: str) -> None:
    with pytest.raises(BudgetError, match=rf"got {name}\. Use secateur\.prune"):
        Budget(**{name: 0.5}).targets(DENSE)  # type: ignore[arg-type]


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
