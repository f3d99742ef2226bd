"""Replace files and folders in one step, so that a reader never sees a half-written one."""

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
    """Give a temporary folder on the same disk as `path`. It is deleted after the block.

    Raises:
        ExportError: If the folder of `path` cannot be written to.
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
    """Move a checked file, and its data files, to their final place.

    Data files lie beside `written`, and their names contain a checksum. So the old file still finds its own
    data until it is replaced, and the new file finds the new data. Old data files are deleted at the end.
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
    """Move a checked folder to its final place, with two renames if a folder is there already.

    If the process is killed between the two renames, nothing is at `path`. The old folder is then beside
    it, under a hidden name.
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
