"""The nearest cost not above a target, for tools that take a ratio rather than a budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import process_time
from typing import Generic, TypeVar

ROUNDS = 10
T = TypeVar("T")


class UnreachedError(Exception):
    """No setting tried costs as little as asked."""


@dataclass(frozen=True)
class Found(Generic[T]):
    """The best trial.

    Attributes:
        setting: What it was made with.
        cost: What it costs.
        seconds: Processor time of making it.
        value: What was made.
    """

    setting: float
    cost: float
    seconds: float
    value: T


def nearest_below(
    make: Callable[[float], T], cost: Callable[[T], float], target: float, rounds: int = ROUNDS
) -> Found[T]:
    """Bisects a setting in (0, 1), of which more costs less, and returns the dearest trial within the target.

    Args:
        make: From a setting.
        cost: Of what was made.
        target: The highest cost allowed.
        rounds: Trials; the setting is found to 2 to the power of minus `rounds`.

    Raises:
        UnreachedError: No trial was within the target.
    """
    low, high = 0.0, 1.0
    best: Found[T] | None = None
    smallest = float("inf")
    for _ in range(rounds):
        middle = (low + high) / 2
        start = process_time()
        value = make(middle)
        seconds = process_time() - start
        found = Found(middle, cost(value), seconds, value)
        smallest = min(smallest, found.cost)
        if found.cost <= target:
            high = middle
            if best is None or found.cost > best.cost:
                best = found
        else:
            low = middle
    if best is None:
        raise UnreachedError(f"expected at most {target:.3f} of the MACs, got no less than {smallest:.3f}")
    return best
