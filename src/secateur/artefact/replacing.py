"""The one way to write a file: beside the old one, which it replaces in one step."""

from __future__ import annotations

import glob
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new file beside `path`, of the same suffix, which takes its place if the block succeeds.

    So a reader finds the old file or the new one, whole, also after a crash. Until then `path` is as it was;
    where the block fails, it stays so. `remove_partial` deletes what a killed process left.

    Raises:
        OSError: Nothing can be written there.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with replacing(Path(folder) / "a.txt") as partial:
        ...         _ = partial.write_text("new")
        ...     [file.name for file in Path(folder).iterdir()]
        ['a.txt']
    """
    partial = path.with_name(f".{path.stem}.partial-{secrets.token_hex(4)}{path.suffix}")
    partial.touch(exist_ok=False)
    mode = partial.stat().st_mode
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.chmod(partial, mode)  # some writers make files that only the owner can read
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    """Write a text file by `replacing`, in UTF-8 and with the line ends that `text` has.

    Raises:
        OSError: It cannot be written.
        ValueError: The path is none, or the text cannot be encoded.
    """
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="")


def remove_partial(path: Path) -> None:
    """Delete what killed processes left of writing `path`."""
    for partial in path.parent.glob(f".{glob.escape(path.stem)}.partial-*{glob.escape(path.suffix)}"):
        partial.unlink(missing_ok=True)
