"""The seed of a run: a whole number that every generator takes."""

from __future__ import annotations

import operator
from typing import Any

from secateur.errors import SettingError

LEAST, MOST = -(1 << 63), (1 << 63) - 1
"""Bounds of a seed."""


def seed_of(seed: Any) -> int:
    """The seed as a plain number.

    Raises:
        SettingError: It is no whole number, or out of bounds.

    Example:
        >>> seed_of(7)
        7
    """
    try:
        found = None if isinstance(seed, bool) else operator.index(seed)
    except TypeError:
        found = None
    if found is None or not LEAST <= found <= MOST:
        raise SettingError(
            f"seed: expected a whole number from {LEAST} to {MOST}, got {repr(seed)[:60]}. Write seed=0."
        )
    return found
