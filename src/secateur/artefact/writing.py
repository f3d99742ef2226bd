"""Files and folders that appear whole or not at all: written beside the old ones, which they then replace."""

from __future__ import annotations

import glob
import os
import secrets
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from secateur.errors import ArtefactError, SecateurError


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


@contextmanager
def beside(path: Path, error: type[SecateurError] = ArtefactError) -> Iterator[Path]:
    """Give a temporary folder on the same disk as `path`. It is deleted after the block.

    Raises:
        SecateurError: The class that `error` names, if the folder of `path` cannot be written to.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as refused:
        raise error(
            f"{path}: expected a folder that can be written to, got {refused.strerror}. Name another."
        ) from refused
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


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `path` at the end: all of it or nothing.

    Raises:
        ArtefactError: If there is something at `path`, other than an empty folder, or nothing can be written.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ArtefactError(
            f"{path}: expected a new or empty folder, got one that holds files. Name another."
        )
    with beside(path) as temporary:
        written = temporary / path.name
        written.mkdir()
        yield written
        put_folder(written, path)


@contextmanager
def folder_in_place(out: Path) -> Iterator[Path]:
    """Give a temporary folder. If the block succeeds, its files move to `out` together.

    If `out` does not exist, it appears by one rename. If it exists, files of the same names are replaced and
    all others are not touched. Ctrl-C then waits until all files are replaced, and a failure puts the old
    files back. If the process is killed, `out` holds the old model or the new one, because its two files
    are exchanged in the same order as in `secateur.save`.
    """
    there = out.is_dir()
    parent = out if there else out.parent
    parent.mkdir(parents=True, exist_ok=True)
    partial = parent / f".{out.name or 'out'}.partial-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        yield partial
        with _undisturbed():
            if there:
                _replace(partial, out)
            else:
                os.replace(partial, out)
    finally:
        with _undisturbed():
            shutil.rmtree(partial, ignore_errors=True)


def _replace(new: Path, out: Path) -> None:
    """Put every file of `new` into `out`; if one fails, all are as they were."""
    kept = new / ".old"
    kept.mkdir()
    done: list[tuple[Path, Path | None]] = []
    try:
        for source, target in _moves(new, out):
            old = None
            if target.exists():
                old = kept / target.name
                _link(target, old)
            done.append((target, old))
            os.replace(source, target)
    except BaseException:
        for target, old in reversed(done):
            if old is None:
                target.unlink(missing_ok=True)
            elif old.exists():
                os.replace(old, target)
        raise


def _moves(new: Path, out: Path) -> list[tuple[Path, Path]]:
    """What is renamed to what, in order: the model first, its record by way of the name that readers know."""
    from secateur.artefact.save import RECORD, TENSORS, WAITING

    names = sorted(path.name for path in new.iterdir() if path.is_file())
    moves = []
    if RECORD in names and TENSORS in names:
        moves = [(new / RECORD, out / WAITING), (new / TENSORS, out / TENSORS), (out / WAITING, out / RECORD)]
    taken = {source.name for source, _ in moves}
    return moves + [(new / name, out / name) for name in names if name not in taken]


def _link(path: Path, other: Path) -> None:
    """A second name for a file, or a copy where the file system has no such thing."""
    try:
        os.link(path, other)
    except OSError:
        shutil.copy2(path, other)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Ctrl-C inside the block takes effect behind it. Signals reach the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[Any] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: caught.append(frame))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if caught:
        raise KeyboardInterrupt
