from __future__ import annotations

from typing import Any

import pytest

from secateur import Budget, Cost, SettingError
from secateur.integrations import Schedule

DENSE = Cost(params=1_000, macs=10_000)


def zhu_gupta(t: int, begin: int, every: int, count: int, final: float) -> float:
    """Equation 1 of the paper: the sparsity at step t, from an initial sparsity of 0."""
    return final + (0.0 - final) * (1 - (t - begin) / (count * every)) ** 3


@pytest.mark.parametrize("left", [0.25, 0.6])
def test_the_cubic_curve_is_the_papers(left: float) -> None:
    schedule = Schedule(Budget(macs=left), start=40, end=240, every=50)
    assert schedule.steps == (90, 140, 190, 240)
    for number, step in enumerate(schedule.steps, 1):
        expected = DENSE.macs * (1 - zhu_gupta(step, 40, 50, 4, 1 - left))
        assert schedule.target(number, DENSE).macs == pytest.approx(expected, abs=1)


def test_the_linear_curve_and_both_bounds() -> None:
    schedule = Schedule(Budget(macs=0.2, params=500), start=0, end=8, rounds=4, curve="linear")
    targets = [schedule.target(k, DENSE) for k in (1, 2, 3, 4)]
    assert [t.macs for t in targets] == [8_000, 6_000, 4_000, 2_000]
    assert [t.params for t in targets] == [875, 750, 625, 500]


@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.37, 0.7, 0.9])
def test_the_last_round_is_the_budget_itself(fraction: float) -> None:
    budget = Budget(macs=fraction, params=fraction)
    last = Schedule(budget, 0, 10, rounds=3).target(3, DENSE)
    assert {"macs": last.macs, "params": last.params} == budget.targets(DENSE)


def test_spend_is_passed_on() -> None:
    schedule = Schedule(Budget(macs=0.5, spend=False), 0, 4, rounds=2)
    assert not schedule.target(1, DENSE).spend


def test_which_round_is_due() -> None:
    schedule = Schedule(Budget(macs=0.5), start=10, end=20, rounds=3)
    assert schedule.steps == (13, 16, 20)
    assert [schedule.due(step) for step in (0, 12, 13, 15, 16, 19, 20, 99)] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert Schedule(Budget(macs=0.5), 0, 10, every=4).steps == (4, 8)  # 10 is not reached in fours


def test_shares_of_all_steps() -> None:
    schedule = Schedule(Budget(macs=0.5), start=0.1, end=0.6, rounds=5)
    with pytest.raises(SettingError, match=r"expected steps, got shares 0\.1 and 0\.6"):
        _ = schedule.steps
    with pytest.raises(SettingError, match=r"start=0\.1 and end=0\.6 are shares, got inf"):
        schedule.over(float("inf"))
    assert schedule.over(1_000).steps == (200, 300, 400, 500, 600)
    with pytest.raises(SettingError, match="at least one step a round from 0 to 3, got 5 rounds"):
        schedule.over(6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": 0.5}, r"expected a Budget of macs or params, got 0\.5"),
        ({"budget": Budget(latency=0.5)}, "expected a Budget of macs or params"),
        ({"budget": Budget(sparsity=0.5)}, "expected a Budget of macs or params"),
        ({"curve": "quartic"}, "expected curve 'cubic' or 'linear', got 'quartic'"),
        ({"every": 2}, "expected either rounds or every, got 2 and 2"),
        ({"rounds": None}, "expected either rounds or every, got None and None"),
        ({"rounds": 0}, "expected rounds to be an integer of at least 1, got 0"),
        ({"rounds": True}, "expected rounds to be an integer of at least 1, got True"),
        ({"start": -1}, "expected start to be a step"),
        ({"end": 1.5}, "expected end to be a step"),
        ({"start": 10}, "expected start before end, got 10 and 10"),
        ({"rounds": 11}, "expected at least one step a round from 0 to 10, got 11 rounds"),
        ({"rounds": None, "every": 11}, "got one every 11"),
    ],
)
def test_settings_out_of_range(change: dict[str, Any], message: str) -> None:
    settings: dict[str, Any] = {"budget": Budget(macs=0.5), "start": 0, "end": 10, "rounds": 2}
    with pytest.raises(SettingError, match=message):
        Schedule(**(settings | change))
    if change.get("budget") is None:
        with pytest.raises(SettingError, match="expected a round from 1 to 2, got 3"):
            Schedule(**settings).target(3, DENSE)
