"""How rules competed, as a table and in sentences."""

from __future__ import annotations

from typing import TYPE_CHECKING

from secateur.formatting import percent

if TYPE_CHECKING:
    from secateur.auto.selection import Candidate, Selection

TITLES = ("rule", "MACs", "parameters")


def sentence(contest: Selection) -> str:
    """What the table says."""
    measured = (
        "squared distance to the dense model's outputs relative to their size"
        if contest.measure == "distance to dense"
        else contest.measure
    )
    return (
        f"Rules at the same budget, applied and repaired on part of the calibration data; {measured}, on "
        f"{contest.held} held-out samples, lower is better. The first decided."
    )


def titles(contest: Selection) -> tuple[str, ...]:
    """Of the columns: a round says what it repaired with, and on how many samples."""
    rounds = (
        f"{entry.repair}, {entry.samples} samples" if entry.repair else "as pruned"
        for entry in contest.rounds
    )
    return (*TITLES, *rounds, "outcome")


def rows(contest: Selection) -> tuple[tuple[str, ...], ...]:
    """A row for each candidate."""
    return tuple(_row(entry, len(contest.rounds)) for entry in contest.candidates)


def _row(entry: Candidate, rounds: int) -> tuple[str, ...]:
    shares = ("" if share is None else percent(share, 1) for share in (entry.macs, entry.params))
    errors = [f"{error:.4g}" for error in entry.errors] + [""] * (rounds - len(entry.errors))
    return (entry.name, *shares, *errors, entry.verdict)


def lines(contest: Selection) -> tuple[str, ...]:
    """What the table says, and each candidate in a line."""
    found = []
    for entry in contest.candidates:
        errors = ", ".join(f"{error:.3g}" for error in entry.errors)
        found.append(f"{entry.name}: {errors + '; ' if errors else ''}{entry.verdict}")
    return (sentence(contest), *found)
