"""The choosers by name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from secateur.pipeline.auto.auto import Auto
from secateur.pipeline.auto.chooser import Chooser
from secateur.pipeline.auto.search import Search

CHOOSERS: Mapping[str, type[Chooser]] = MappingProxyType({"auto": Auto, "search": Search})
"""All of them. A new one is one file and one line here."""


def chooser_of(allocator: Any) -> Chooser | None:
    """Return the chooser of this name, or the chooser itself; None for what is none.

    Example:
        >>> chooser_of("search").name, chooser_of("tod")
        ('search', None)
    """
    if isinstance(allocator, Chooser):
        return allocator
    return CHOOSERS[allocator]() if isinstance(allocator, str) and allocator in CHOOSERS else None
