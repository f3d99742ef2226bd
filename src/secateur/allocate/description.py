"""How a rule describes a decision to a reader, as data that any report can show."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from secateur.formatting import plain


@dataclass(frozen=True)
class Certificate:
    """What a rule guarantees or predicts of its plan.

    Attributes:
        sentences: What it says, a sentence each.
        note: What the table's columns mean.
        titles: Columns of the table.
        rows: Per layer, a cell for each column.
    """

    sentences: tuple[str, ...] = ()
    note: str = ""
    titles: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class Description:
    """What a reader has to know of a rule to read its decision.

    Attributes:
        setting: The setting that a budget solves for; empty if there is none.
        knob: What the rule's knob is called.
        certificate: What the rule guarantees or predicts; None for nothing.
    """

    setting: str = ""
    knob: str = "knob"
    certificate: Certificate | None = None


def listed(found: Mapping[str, Any]) -> Certificate:
    """The certificate of a rule that has no sentences for it: a row for each value."""
    return Certificate(
        sentences=("The rule gave these values.",), titles=("what", "value"), rows=tuple(_rows(found, ()))
    )


def _rows(found: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    for name, value in found.items():
        if isinstance(value, Mapping):
            yield from _rows(value, (*path, name))
        else:
            yield " / ".join((*path, name)), plain(value)
