"""What is written from the result files: a part of docs/figures.md, the full tables, the plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks import results
from benchmarks.frontier import plots, store, tables
from benchmarks.small_networks import NAMES

FULL = results.FOLDER / "frontier.md"
PAGE = Path(__file__).parents[2] / "docs" / "figures.md"
BEGIN, END = "<!-- frontier: begin -->", "<!-- frontier: end -->"


def between(text: str) -> str:
    """What stands between the markers.

    Raises:
        ValueError: Not each marker is there once, in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(END) < text.index(BEGIN):
        raise ValueError(f"{PAGE.name}: expected {BEGIN} and behind it {END}, once each. Put them in.")
    return text[text.index(BEGIN) + len(BEGIN) : text.index(END)].strip("\n")


def replaced(text: str, block: str) -> str:
    """The text with another block between the markers."""
    between(text)
    start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    return f"{text[:start]}\n\n{block}\n\n{text[end:]}"


def contents(names: Sequence[str] = NAMES, folder: Path = results.FOLDER) -> list[store.Run]:
    """The result files that there are, in the order of `names`."""
    return [found for name in names if (found := store.read(name, folder)) is not None]


def texts() -> dict[Path, str]:
    """What the page and the full tables should hold.

    Raises:
        ValueError: The page has no place for its part.
    """
    found = contents()
    return {
        PAGE: replaced(PAGE.read_text(), tables.short(found)),
        FULL: tables.full(found),
    }


def stale() -> list[str]:
    """The files that do not hold what the result files say."""
    return [p.name for p, text in texts().items() if not p.is_file() or p.read_text() != text]


def update() -> None:
    """Writes the texts, and draws every network."""
    for path, text in texts().items():
        path.write_text(text)
    for content in contents():
        plots.draw(content)
