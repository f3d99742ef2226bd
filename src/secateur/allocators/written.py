"""The numbers of a decision as a plan writes them: so many digits as do not depend on the order of sums.

One thread or several, one process or several add up in another order. What that changes is far behind the
digits that are written. So plan files are the same byte for byte, unless a number lies just between two.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

DIGITS, KNOB_DIGITS = 4, 6
"""Significant digits of certificates, and of a knob that a budget solved for."""


def rounded(value: Any) -> Any:
    """The certificates, each number to the nearest of `DIGITS` digits: so no order between two is reversed.

    Example:
        >>> rounded({"sum": 0.123456, "kept": 123456, "groups": [1e-9 / 3, None]})
        {'sum': 0.1235, 'kept': 123456, 'groups': [3.333e-10, None]}
    """
    if isinstance(value, Mapping):
        return {name: rounded(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(entry) for entry in value]
    return float(f"{value:.{DIGITS - 1}e}") if isinstance(value, float) and math.isfinite(value) else value


def rounded_up(knob: float) -> float:
    """The knob, to the next of `KNOB_DIGITS` digits that is no lower: so it removes no less.

    Example:
        >>> rounded_up(0.25), rounded_up(0.1), rounded_up(1 / 3), rounded_up(-1 / 3)
        (0.25, 0.1, 0.333334, -0.333333)
    """
    near = float(f"{knob:.{KNOB_DIGITS - 1}e}")
    if near >= knob or math.isclose(near, knob, rel_tol=1e-12) or not math.isfinite(knob):
        return near
    step = 10.0 ** (math.floor(math.log10(abs(knob))) - KNOB_DIGITS + 1)
    return float(f"{near + step:.{KNOB_DIGITS - 1}e}")
