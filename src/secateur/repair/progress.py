"""A bar over the layers of a sweep."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import track

T = TypeVar("T")


def bar(steps: Sequence[T], title: str, progress: bool) -> Iterator[T]:
    """The steps one by one, with a bar on stderr if that is a terminal."""
    if not (progress and sys.stderr.isatty()):
        yield from steps
        return
    yield from track(steps, title.capitalize(), console=Console(stderr=True), transient=True)
