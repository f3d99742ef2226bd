from __future__ import annotations

from collections.abc import Callable

import pytest

import secateur as sc
from secateur.measure.latency.interval import Interval
from secateur.measure.latency.search import Found, fast_enough


def search(
    target: float, share: Callable[[float], float], floor: float = 0.1, noise: float = 0.0, most: float = 1.0
) -> tuple[Found[float], list[float]]:
    """The search on a rule whose plans cost exactly what is asked, down to `floor`."""
    asked: list[float] = []

    def plan_at(macs: float) -> float:
        assert 0 < macs < 1
        if macs < floor:
            raise sc.UnreachableBudgetError("too small", smallest=floor)
        return macs

    def measure(macs: float) -> Interval:
        asked.append(macs)
        return Interval(share(macs), share(macs) - noise, share(macs) + noise)

    return fast_enough(target, plan_at, measure, most=most), asked


@pytest.mark.parametrize("fixed", [0.0, 0.2, 0.4])
def test_it_finds_the_most_macs_that_are_fast_enough(fixed: float) -> None:
    found, asked = search(0.6, lambda macs: fixed + (1 - fixed) * macs)
    best = (0.6 - fixed) / (1 - fixed)
    assert found.share.high <= 0.6
    assert best - 2**-6 <= found.macs <= best + 1e-9
    assert len(asked) <= 7
    assert found.what == found.macs
    assert found.macs == max(a for a in asked if fixed + (1 - fixed) * a <= 0.6)


def test_the_whole_interval_has_to_be_within_the_target() -> None:
    found, _ = search(0.6, lambda macs: macs, noise=0.1)
    assert found.macs <= 0.5
    assert found.macs >= 0.48


def test_a_plan_that_is_fast_at_once_gives_room_to_the_rest() -> None:
    found, asked = search(0.5, lambda macs: 0.2 + 0.1 * macs)
    assert asked[0] == 0.5
    assert found.macs > 0.98


def test_other_budgets_bound_it() -> None:
    found, asked = search(0.9, lambda macs: macs, most=0.4)
    assert found.macs == 0.4
    assert asked == [0.4]


def test_the_smallest_plan_is_tried_before_giving_up() -> None:
    found, asked = search(0.36, lambda macs: 0.3 + 0.5 * macs, floor=0.11)
    assert 0.11 in asked
    assert 0.11 <= found.macs <= 0.12
    with pytest.raises(sc.UnreachableBudgetError, match=r"at most 30.0%.*got 35.\d%.*latency=0.36") as caught:
        search(0.3, lambda macs: 0.3 + 0.5 * macs, floor=0.11)
    assert caught.value.smallest == pytest.approx(0.355)
