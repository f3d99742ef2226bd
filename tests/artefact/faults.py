"""A process that dies or fails at its n-th change of files, and every writer of the library."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CALLS = ("replace", "fsync", "mkdir", "rmdir", "unlink", "link", "chmod", "write")


class Killed(BaseException):
    """Stands for SIGKILL: from here on, nothing of the process changes a file."""


class Faults:
    """Counts the calls that change files, and lets the n-th one kill the process or fail."""

    def __init__(self, at: int, *, kill: bool) -> None:
        self.at, self.kill, self.count = at, kill, 0

    @property
    def happened(self) -> bool:
        return self.count >= self.at

    def wrapped(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            if self.kill and self.happened:
                raise Killed
            if self.count == self.at:
                raise OSError(errno.ENOSPC, "No space left on device")
            return original(*args, **kwargs)

        return call


@contextmanager
def faults(at: int, *, kill: bool, exchange: bool = True) -> Iterator[Faults]:
    """Inside the block, the n-th change of files goes wrong. Without `exchange`, folders need two renames."""
    from secateur.artefact import writing

    found = Faults(at, kill=kill)
    with pytest.MonkeyPatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, found.wrapped(getattr(os, name)))
        real = writing._exchange
        patch.setattr(writing, "_exchange", found.wrapped(real) if exchange else lambda *_: False)
        yield found


def content(folder: Path) -> dict[str, bytes]:
    """All files by their paths."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def litter(folder: Path) -> list[str]:
    """What unfinished writes left."""
    return [str(p.relative_to(folder)) for p in folder.rglob("*") if p.name.startswith(".")]


def visible(folder: Path) -> dict[str, bytes]:
    """All files but those that unfinished writes left."""
    hidden = {name for name in content(folder) if any(part.startswith(".") for part in Path(name).parts)}
    return {name: data for name, data in content(folder).items() if name not in hidden}
