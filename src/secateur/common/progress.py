"""Bars on a terminal, with the time left."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn, track

T = TypeVar("T")


def bar(steps: Sequence[T], title: str, progress: bool) -> Iterator[T]:
    """The steps one by one, with a bar on stderr if that is a terminal."""
    if not (progress and sys.stderr.isatty()):
        yield from steps
        return
    yield from track(steps, title.capitalize(), console=Console(stderr=True), transient=True)


class Step(Protocol):
    """Moves a bar on."""

    def __call__(self, what: str) -> None:
        """Say what comes next; what came before is done."""


@contextmanager
def steps(total: int | None, progress: bool) -> Iterator[Step]:
    """A bar over steps that say what they are, on stderr if that is a terminal.

    Args:
        total: How many there will be, if known.
        progress: Whether to show it.
    """
    if not (progress and sys.stderr.isatty()):
        yield lambda what: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}" if total is None else "{task.completed} of {task.total}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        begun = False

        def step(what: str) -> None:
            nonlocal begun
            bar.update(task, description=what, advance=int(begun))
            begun = True

        yield step
