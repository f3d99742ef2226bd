"""How figures are written for people: counts, shares, times and lists of names."""

from __future__ import annotations

import math
from collections.abc import Iterable

MINUS = "\N{MINUS SIGN}"


def number(value: int) -> str:
    """A count, exact below ten million and with four digits above.

    Example:
        >>> number(78_042), number(40_813_184), number(4_089_184_256)
        ('78,042', '40.81 M', '4.089 G')
    """
    for size, unit in ((1_000_000_000, "G"), (10_000_000, "M")):
        if value >= size:
            return f"{value / (1_000_000 if unit == 'M' else size):.4g} {unit}"
    return f"{value:,}"


def percent(part: float, whole: float) -> str:
    """`part` as a percentage of `whole`; a dash where that means nothing.

    Example:
        >>> percent(1, 3), percent(1, 0)
        ('33.3 %', '–')
    """
    if not whole or not math.isfinite(part) or not math.isfinite(whole):
        return "–"
    share = 100 * part / whole
    return f"{share:,.0f} %" if abs(share) >= 1000 else f"{share:.1f} %"


def share(value: float | None) -> str:
    """A share of 1 as a percentage; a dash where it is not known."""
    return "–" if value is None else f"{100 * value:.1f} %"


def milliseconds(seconds: float) -> str:
    """Seconds as milliseconds, with about three digits that count.

    Example:
        >>> milliseconds(0.00123), milliseconds(0.0456)
        ('1.23 ms', '45.6 ms')
    """
    return f"{1e3 * seconds:,.{places(1e3 * seconds)}f} ms"


def places(size: float) -> int:
    """How many digits after the decimal point leave about three significant ones."""
    return 3 if size < 1 else 2 if size < 10 else 1 if size < 100 else 0


def shorten(names: Iterable[str], most: int = 3) -> str:
    """The first names, and how many more there are.

    Example:
        >>> shorten(["a", "b", "c", "d"])
        'a, b, c and 1 more'
    """
    names = list(names)
    line = ", ".join(names[:most])
    return line if len(names) <= most else f"{line} and {len(names) - most} more"


def plain(value: object) -> str:
    """A setting, or any value that JSON can hold, without its brackets and quotes.

    Example:
        >>> plain(0.123456), plain(True), plain(["a", "b"]), plain({"stem": 0.5})
        ('0.1235', 'yes', 'a, b', 'stem: 0.5')
    """
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{name}: {plain(part)}" for name, part in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(plain, value)) or "none"
    return str(value)
