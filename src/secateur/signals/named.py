"""Signals that are asked for by name, where what is scored is no unit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from secateur.errors import ScoreError
from secateur.signals.units.combination import Combination, parse

S = TypeVar("S")


def leaves(asked: Iterable[Any], known: Mapping[str, type[S]], base: type[S]) -> dict[str, S]:
    """Return the signals that are asked for, or that what is asked for is made of, by name.

    Args:
        asked: Names, also ``a*b`` and ``a+b``, signals, or combinations.
        known: The signals that have names.
        base: The class of all signals of this kind.

    Raises:
        ScoreError: A name is unknown, or something is no such signal.
    """
    found: dict[str, S] = {}
    for one in map(parse, asked):
        if isinstance(one, Combination):
            found |= leaves(one.parts, known, base)
        elif isinstance(one, base):
            found[getattr(one, "name", "")] = one
        elif isinstance(one, str) and one in known:
            found.setdefault(one, known[one]())
        else:
            raise ScoreError(
                f"score: expected one of {', '.join(known)} or an instance of {base.__name__}, got {one!r}. "
                "Name one."
            )
    return found
