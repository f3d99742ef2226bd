"""How an allocator describes its decision to a reader, as data that any report can show."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from secateur.common.formatting import plain


@dataclass(frozen=True)
class Certificate:
    """What an allocator guarantees or predicts for its plan, in sentences and a table.

    Attributes:
        sentences: The statement, one sentence in each entry.
        note: Explains the columns of the table.
        titles: Titles of the columns.
        rows: One row for each layer, with one cell for each column.
    """

    sentences: tuple[str, ...] = ()
    note: str = ""
    titles: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class Description:
    """What a report needs to show an allocator's decision.

    Attributes:
        setting: Name of the setting that is solved for a budget; empty if there is none.
        knob: Name of the knob.
        certificate: What the allocator guarantees or predicts; None if nothing.
    """

    setting: str = ""
    knob: str = "knob"
    certificate: Certificate | None = None


def listed(found: Mapping[str, Any]) -> Certificate:
    """Default certificate for any data: a table with one row for each value."""
    return Certificate(
        sentences=("The rule gave these values.",), titles=("what", "value"), rows=tuple(_rows(found, ()))
    )


def _rows(found: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    for name, value in found.items():
        if isinstance(value, Mapping):
            yield from _rows(value, (*path, name))
        else:
            yield " / ".join((*path, name)), plain(value)
