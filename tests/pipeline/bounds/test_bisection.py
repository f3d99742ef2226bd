"""Bisection over shares: the border is found where the answer is monotone, with few questions."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import secateur as sc
from secateur.pipeline.bounds.bisection import GAP, bisect


def searched(
    border: float, *, below: bool, first: float = 0.6, floor: float = 0.0, most: float = 1.0, probes: int = 20
) -> tuple[list[float], list[float]]:
    """The shares that worked, and all that were asked for, where shares below or above a border work."""
    worked: list[float] = []
    asked: list[float] = []

    def works(share: float) -> bool:
        if share < floor:
            raise sc.UnreachableBudgetError("too small", smallest=floor)
        asked.append(share)
        if (share <= border) if below else (share >= border):
            worked.append(share)
        return asked[-1] in worked

    bisect(works, *((0.0, most) if below else (most, 0.0)), first, probes=probes)
    return worked, asked


@given(st.floats(0.02, 0.98), st.booleans(), st.floats(0.05, 0.95))
def test_the_border_is_found_from_either_side(border: float, below: bool, first: float) -> None:
    worked, asked = searched(border, below=below, first=first)
    assert abs((max(worked) if below else min(worked)) - border) <= GAP
    assert len(asked) <= 9


@given(st.floats(0.05, 0.9), st.floats(0.05, 0.9), st.booleans())
def test_nothing_below_the_smallest_is_asked_for(border: float, floor: float, below: bool) -> None:
    worked, asked = searched(border, below=below, floor=floor)
    assert min(asked) >= floor
    if below and floor <= border - GAP:
        assert max(worked) >= border - GAP
    if below and floor > border:
        assert not worked
        assert floor in asked
    if not below:
        assert min(worked, default=1.0) <= max(border, floor) + GAP


@pytest.mark.parametrize("probes", [1, 3])
def test_no_more_than_the_given_number_of_probes(probes: int) -> None:
    _, asked = searched(0.31, below=True, probes=probes)
    assert len(asked) == probes


def test_what_other_bounds_allow_is_tried_first_and_is_the_end() -> None:
    worked, asked = searched(0.9, below=True, first=0.4, most=0.4)
    assert worked == asked == [0.4]


def test_where_one_plan_alone_is_left_it_is_asked_for() -> None:
    worked, asked = searched(0.9, below=True, first=0.2, floor=0.4, most=0.4)
    assert worked == asked == [0.4]
