"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from secateur.errors import ExportError


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A temporary folder on the same disk as `path`, gone after the block.

    Raises:
        ExportError: If nothing can be written there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise ExportError(
            f"export({path}): expected a folder that can be written to, got {error.strerror}. Name another."
        ) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def put(written: Path, path: Path) -> None:
    """Move a checked file to its place; its other files, which only it names, go first.

    What stands beside `written` is data that it refers to by a name that holds their checksum. So the old
    file finds its own data until it is replaced, and the new one from then on.
    """
    others = [file for file in written.parent.iterdir() if file != written]
    for file in others:
        os.replace(file, path.parent / file.name)
    os.replace(written, path)
    kept = {file.name for file in others}
    for stale in path.parent.glob(f"{path.name}.*.data"):
        if stale.name not in kept:
            stale.unlink()


def put_folder(written: Path, path: Path) -> None:
    """Move a checked folder to its place, in two renames if one is there already.

    Only a kill between the two leaves nothing at `path`; the old folder then stands beside it, hidden.
    """
    aside = written.with_name(f"{written.name}.old")
    try:
        if path.exists():
            os.replace(path, aside)
        os.replace(written, path)
    except BaseException:  # Ctrl-C too: the temporary folder is about to go, with the old one in it
        if aside.exists() and not path.exists():
            os.replace(aside, path)
        raise
