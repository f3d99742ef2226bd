"""Read amounts that people write: sizes, times and percentages."""

from __future__ import annotations

import math
import re

from secateur.errors import BudgetError, SettingError
from secateur.signals.memory import in_bytes

_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "μs": 1e-6}


def share_of(value: object) -> float | None:
    """Return a fraction in (0, 1) as a float, which may be written as text or in percent; None if it is none.

    Example:
        >>> share_of(0.6), share_of("0.6"), share_of("60 %"), share_of("512 MB")
        (0.6, 0.6, 0.6, None)
    """
    share = _number(value)
    return share if share is not None and 0 < share < 1 else None


def _number(value: object) -> float | None:
    """A number, or the text of one, perhaps in percent; None for anything else."""
    whole = 1.0
    if isinstance(value, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%?)\s*", value)
        value, whole = (found[1], 100.0 if found[2] else 1.0) if found else (None, 1.0)
    if isinstance(value, bool | type(None)):
        return None
    try:
        return float(value) / whole  # type: ignore[arg-type]  # NumPy's numbers too
    except (TypeError, ValueError):
        return None


def seconds_of(value: object) -> float | None:
    """Return a time such as ``30 ms`` in seconds; None for anything else.

    Example:
        >>> seconds_of("30 ms"), seconds_of("0.5s"), seconds_of("30")
        (0.03, 0.5, None)
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zµμ]+)\s*", value) if isinstance(value, str) else None
    if found is None or found[2] not in _SECONDS or float(found[1]) <= 0:
        return None
    return float(found[1]) * _SECONDS[found[2]]


def latency_of(value: object) -> float | str:
    """Return a bound on latency as it was given: a share of the dense one, or text such as ``30 ms``.

    Raises:
        BudgetError: It is neither.
    """
    if (share := share_of(value)) is not None:
        return share
    if seconds_of(value) is not None:
        return str(value).strip()
    raise BudgetError(
        "budget: expected latency to be a share of the dense one, a float in (0, 1), or a time with its unit "
        f"(s, ms, us), got {value!r}. Write latency=0.6 or latency='30 ms'."
    )


def memory_of(value: object) -> float | int | str:
    """Return a bound on memory as it was given: a share of the dense one, bytes, or text such as ``512 MB``.

    Raises:
        BudgetError: It is none of these.
    """
    if (share := share_of(value)) is not None:
        return share
    try:
        if isinstance(value, str):
            return in_bytes(value) and value.strip()
        if isinstance(value, int) and not isinstance(value, bool):
            return in_bytes(value)
    except SettingError:
        pass
    raise BudgetError(
        "budget: expected memory to be a share of the dense one, a float in (0, 1), a number of bytes, or a "
        f"size with its unit, got {value!r}. Write memory=0.6, memory='512 MB' or memory='1.5 GiB'."
    )


def drop_of(name: str, value: object, most: float) -> float:
    """Return the largest allowed drop or rise as a float; it may be given as ``1 %``.

    Args:
        name: The name of the bound.
        value: What was given.
        most: It must be below this.

    Raises:
        BudgetError: It is not above 0 and below `most`.
    """
    found = _number(value)
    if found is not None and 0 < found < most and math.isfinite(found):
        return found
    raise BudgetError(
        f"budget: expected {name} to be a number above 0"
        + (f" and below {most:g}" if math.isfinite(most) else "")
        + f", or a percentage, got {value!r}. Write 0.01 or '1%' for one "
        + ("point of accuracy." if name == "accuracy_drop" else "percent.")
    )
