"""Functions that remember what they returned."""

from __future__ import annotations

import functools

import pytest

from secateur.targets.units.module_form.tracking import Tracked
from secateur.targets.units.module_form.uncached import uncached


@functools.lru_cache
def halved(size: int) -> int:
    return size // 2


def test_a_tracked_number_does_not_come_back_as_one_of_an_earlier_run() -> None:
    assert halved(8) == 4
    remembered = halved
    with uncached():
        found = halved(Tracked.attribute("width", 8))
    assert isinstance(found, Tracked)
    assert found.sources == {"width"}
    assert halved is remembered
    assert type(halved(8)) is int
    assert halved.cache_info().currsize == 1


def test_caches_come_back_after_an_error() -> None:
    remembered = halved
    with pytest.raises(ValueError, match="stop"), uncached():
        raise ValueError("stop")
    assert halved is remembered


@functools.lru_cache(None)
def ways(n: int) -> int:
    return 1 if n < 2 else ways(n - 1) + ways(n - 2)


def test_a_recursion_over_a_cache_stays_fast() -> None:
    """Without any cache this would take years."""
    with uncached():
        assert ways(90) == 4660046610375530309
        ways.cache_clear()
    assert ways.cache_info().currsize == 0
