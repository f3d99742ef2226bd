"""The two files of an artefact, which change together, and what lies beside them in the folder.

The record names the checksum of its tensors. A save puts the new tensors under a hidden name with their
checksum, then the new record, and then moves the tensors to their usual name. So the rename of the record
alone decides: whatever a reader finds, the tensors are under the usual name or under the hidden one.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from secateur.artefact.writing import (
    check_replaceable,
    flush,
    locked,
    os_errors_as,
    private_folder,
    signals_delayed,
    sync,
)
from secateur.common.reading import read_bytes
from secateur.errors import ArtefactError, SecateurError

TENSORS, RECORD = "model.safetensors", "secateur.json"
"""Names of the two files."""

LARGEST_RECORD = 1 << 28
"""The most bytes of a record. It holds a plan."""

_HIDDEN = re.compile(r"\.model-([0-9a-f]{64})\.safetensors")


def hidden_name(checksum: str) -> str:
    """Return the name of the tensors' file between two renames of a save."""
    return f".model-{checksum}.safetensors"


@contextmanager
def folder_in_place(out: Path, error: type[SecateurError] = ArtefactError) -> Iterator[Path]:
    """Give a temporary folder. If the block succeeds, all its files move to `out`.

    If `out` does not exist, it appears by one rename. If it exists, files of the same names are replaced and
    all others are not changed. Ctrl-C waits until all files are replaced, and a failure restores the old
    files. If the process is killed, the two files of the model are both the old or both the new ones.

    Raises:
        SecateurError: Nothing can be written there.
    """
    with os_errors_as(out, error):
        there = os.path.isdir(out)
        parent = out if there else out.parent
        if not there and os.path.lexists(out):
            raise NotADirectoryError(errno.ENOTDIR, "a file where the folder should be")
        parent.mkdir(parents=True, exist_ok=True)
        with private_folder(parent) as private:
            written = private / "new"
            written.mkdir()
            yield written
            flush(written)
            with locked(parent), signals_delayed():
                if there or os.path.isdir(out):
                    _merge(written, out, private / "old")
                else:
                    os.replace(written, out)


def _merge(new: Path, out: Path, old: Path) -> None:
    """Move every file of `new` into `out`. If one fails, restore all old files from `old`."""
    names = sorted(path.name for path in new.iterdir())
    for name in names:
        check_replaceable(out / name, f"the file {name}")
    finish_save(out)
    old.mkdir()
    for name in names:
        if os.path.lexists(out / name):
            _link(out / name, old / name)
    try:
        _move(new, names, out)
    except BaseException:
        for name in names:
            if (
                not os.path.exists(old / name)
                and os.path.lexists(out / name)
                and not os.path.exists(new / name)
            ):
                os.unlink(out / name)
        _move(old, sorted(path.name for path in old.iterdir()), out)
        raise
    finally:
        finish_save(out)


def _move(source: Path, names: list[str], out: Path) -> None:
    """Move files in such an order that there is always a complete artefact, even if it is interrupted."""
    paired = {RECORD, TENSORS} <= set(names)
    hidden = out / hidden_name((_checksum(source / RECORD) or "") if paired else "")
    if paired:
        os.replace(source / TENSORS, hidden)
        sync(out)
        os.replace(source / RECORD, out / RECORD)
        sync(out)
        _rename(hidden, out / TENSORS)
    for name in names:
        if not paired or name not in (RECORD, TENSORS):
            os.replace(source / name, out / name)


def finish_save(folder: Path) -> None:
    """Finish a save that was killed: give the record's tensors their usual name, and delete others."""
    hidden = [entry.name for entry in os.scandir(folder) if _HIDDEN.fullmatch(entry.name)]
    if not hidden:
        return
    named = hidden_name(_checksum(folder / RECORD) or "")
    if named in hidden:
        _rename(folder / named, folder / TENSORS)
    for name in hidden:
        if name != named:
            os.unlink(folder / name)


def _rename(path: Path, other: Path) -> None:
    """Rename a file, also if both names belong to the same file: the system does nothing then."""
    os.replace(path, other)
    if os.path.lexists(path):
        os.unlink(path)


def _checksum(record: Path) -> str | None:
    """Return the checksum of the tensors that a record names; None if it has none."""
    try:
        found = json.loads(read_bytes(record, LARGEST_RECORD, "record", ArtefactError))["tensors_sha256"]
    except (SecateurError, ValueError, LookupError, TypeError, RecursionError):
        return None
    return found if isinstance(found, str) and re.fullmatch("[0-9a-f]{64}", found) else None


def _link(path: Path, other: Path) -> None:
    """Make a hard link to a file; a copy, if the file system has no links."""
    try:
        os.link(path, other, follow_symlinks=False)
    except (OSError, NotImplementedError):
        shutil.copy2(path, other, follow_symlinks=False)
