"""Show how a rule was selected among several, as a table and in sentences."""

from __future__ import annotations

from typing import TYPE_CHECKING

from secateur.common.formatting import percent
from secateur.measure.measures import MEASURES

if TYPE_CHECKING:
    from secateur.pipeline.auto.selection import Candidate, Selection

TITLES = ("rule", "MACs", "parameters")

MOST = 24
"""At most this many candidates are shown, the best first. The report as JSON has all of them."""


def sentence(choice: Selection) -> str:
    """Explain the table of candidates in a few sentences."""
    left = len(choice.candidates) - MOST
    measured = MEASURES.get(choice.measure, choice.measure)
    return (
        f"Rules at the same budget, applied and repaired on part of the calibration data; {measured}, on "
        f"{choice.held} held-out samples, lower is better. The first decided."
        + (f" The {left} others are in the report as JSON." if left > 0 else "")
    )


def titles(choice: Selection) -> tuple[str, ...]:
    """Return the column titles. The title of a round names its repair and its number of samples."""
    rounds = (
        f"{entry.repair}, {entry.samples} samples" if entry.repair else "as pruned" for entry in choice.rounds
    )
    return (*TITLES, *rounds, "outcome")


def rows(choice: Selection) -> tuple[tuple[str, ...], ...]:
    """Return one row of cells for each of the best candidates."""
    return tuple(_row(entry, len(choice.rounds)) for entry in choice.candidates[:MOST])


def _row(entry: Candidate, rounds: int) -> tuple[str, ...]:
    shares = ("" if share is None else percent(share, 1) for share in (entry.macs, entry.params))
    errors = [f"{error:.4g}" for error in entry.errors] + [""] * (rounds - len(entry.errors))
    return (entry.name, *shares, *errors, entry.verdict)


def lines(choice: Selection) -> tuple[str, ...]:
    """Return the explanation, and then one line for each of the best candidates."""
    found = []
    for entry in choice.candidates[:MOST]:
        errors = ", ".join(f"{error:.3g}" for error in entry.errors)
        found.append(f"{entry.name}: {errors + '; ' if errors else ''}{entry.verdict}")
    return (sentence(choice), *found)
