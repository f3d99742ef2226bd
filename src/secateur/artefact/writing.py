"""The one way to write files and folders: each appears whole or not at all, after any number of kills.

New content is written in a folder of its own beside the target, which only its owner can enter and whose
name cannot be guessed. It is flushed to disk and takes the target's place by one rename. The folder holds a
marker that its writer keeps locked. So the next write can tell what a killed process left, and deletes it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import secrets
import shutil
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from secateur.errors import ArtefactError, SecateurError

if sys.platform != "win32":
    import fcntl

PREFIX = ".secateur-partial-"
"""Folders of unfinished writes have this name, followed by 32 random digits."""

_PARTIAL = re.compile(re.escape(PREFIX) + "[0-9a-f]{32}")
OWNER, MARK = (
    ".secateur-owner",
    b"secateur writes here; the next write deletes this folder once its writer is gone\n",
)
_REPLACED = "replaced"
_TRIALS, _PAUSE = 12_000, 0.005
"""How often a writer waits for others in the same folder, and for how long each time. [s]"""


@contextmanager
def replacing(
    path: Path, error: type[SecateurError] = ArtefactError, *, parents: bool = False
) -> Iterator[Path]:
    """Give a temporary path for a new file. If the block succeeds, the file replaces `path`.

    So a reader finds the whole old file or the whole new one, also after a crash. A link at `path` is
    replaced; its target is not changed. Other files that the block writes beside the new one, named
    ``<name>.<checksum>.data``, are moved first; those of the old file are deleted last.

    Args:
        path: The file.
        error: The class of errors about files that cannot be written.
        parents: Whether to create the folder of `path`.

    Raises:
        SecateurError: Nothing can be written there. `path` is not changed.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with replacing(Path(folder) / "a.txt") as partial:
        ...         _ = partial.write_text("new")
        ...     [file.name for file in Path(folder).iterdir()]
        ['a.txt']
    """
    with os_errors_as(path, error):
        check_replaceable(path)
        if parents:
            path.parent.mkdir(parents=True, exist_ok=True)
        with private_folder(path.parent) as folder:
            yield folder / path.name
            flush(folder)
            with locked(path.parent), signals_delayed():
                _put(folder / path.name, path)


def check_replaceable(path: Path, called: str = "the file") -> None:
    """Check that `path` is no folder, pipe or device, and no link to a pipe or device.

    A file must not replace these: ``/dev/stdout``, for example, would be gone for all programs.

    Raises:
        OSError: It is one of these.
    """
    if not path.name or (os.path.isdir(path) and not path.is_symlink()):
        raise IsADirectoryError(errno.EISDIR, f"a folder where {called} should be")
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise OSError(errno.EINVAL, f"a pipe or a device where {called} should be")


def replace_text(path: Path, text: str, error: type[SecateurError] = ArtefactError) -> None:
    """Write a text file by `replacing`, in UTF-8 and with the line ends that `text` has."""
    with os_errors_as(path, error):
        replace_bytes(path, text.encode("utf-8"), error)


def replace_bytes(path: Path, data: bytes | memoryview, error: type[SecateurError] = ArtefactError) -> None:
    """Write a file by `replacing`."""
    with replacing(path, error) as partial, partial.open("xb") as file:
        file.write(data)


@contextmanager
def replacing_folder(path: Path, error: type[SecateurError] = ArtefactError) -> Iterator[Path]:
    """Give an empty temporary folder. If the block succeeds, it replaces the folder at `path`.

    Raises:
        SecateurError: Nothing can be written there. `path` is not changed.
    """
    with os_errors_as(path, error):
        path.parent.mkdir(parents=True, exist_ok=True)
        with private_folder(path.parent) as folder:
            written = folder / "new"
            written.mkdir()
            yield written
            flush(written)
            with locked(path.parent), signals_delayed():
                _put_folder(written, path, folder / _REPLACED)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder. If the block succeeds, it becomes `path`, which must be new or empty.

    Raises:
        ArtefactError: There is something at `path` other than an empty folder, or nothing can be written.
    """
    with os_errors_as(path, ArtefactError):
        taken = path.is_symlink() or (
            os.path.exists(path) and (not os.path.isdir(path) or any(path.iterdir()))
        )
    if taken:
        raise ArtefactError(
            f"{path}: expected a new or empty folder, got one that holds files. Name another."
        )
    with replacing_folder(path) as folder:
        yield folder


@contextmanager
def os_errors_as(path: Path, error: type[SecateurError]) -> Iterator[None]:
    """Turn errors of the operating system inside the block into an error of this class.

    The message names the path and the free space. Errors about a path inside a `private_folder`, which users
    do not know, pass through: the outer block, which has the target's path, handles them.
    """
    try:
        yield
    except SecateurError:
        raise
    except Exception as refused:
        if any(_PARTIAL.fullmatch(part) for part in path.parts):
            raise
        found = _refusal(path, refused)
        if found is None:
            raise
        raise error(found) from refused


def _refusal(path: Path, refused: Exception) -> str | None:
    """Return a message for an error of the operating system; None for any other error."""
    odd = "\0" in str(path) and isinstance(refused, ValueError)
    if not (odd or isinstance(refused, OSError | SafetensorError | UnicodeEncodeError)):
        return None
    known = {
        errno.ENOSPC: "a full disk",
        errno.EDQUOT: "a full quota",
        errno.ENAMETOOLONG: "a path that is too long",
        errno.EACCES: "no permission",
        errno.EPERM: "no permission",
        errno.EROFS: "a file system that is read-only",
        errno.ENOENT: "no such folder",
        errno.ENOTDIR: "a file where a folder should be",
        errno.EEXIST: "something else that is there already",
    }
    number = getattr(refused, "errno", None)
    lines = str(getattr(refused, "strerror", None) or refused).splitlines()
    got = known.get(number or 0) or (lines[0][:200] if lines else type(refused).__name__)
    if "\0" in str(path):
        got = "a path with a null character"
    elif isinstance(refused, SafetensorError) and "os error 28" in str(refused):
        got = known[errno.ENOSPC]
    free = ""
    with suppress(OSError, ValueError, StopIteration):
        there = next(place for place in (path, *path.absolute().parents) if os.path.exists(place))
        free = f" ({shutil.disk_usage(there).free:,} bytes are free there)"
    advice = "Free some space, or name another." if "full" in got else "Name another."
    return f"{path}: expected a place that can be written to, got {got}{free}. {advice}"


@contextmanager
def private_folder(parent: Path) -> Iterator[Path]:
    """Give a new folder in `parent` that only this process uses. It is deleted after the block.

    First, the folders that killed processes left in `parent` are deleted.

    Raises:
        OSError: `parent` cannot be written to.
    """
    sweep(parent)
    folder, marker = _owned(parent)
    try:
        yield folder
    finally:
        try:
            with signals_delayed(), suppress(OSError):
                _discard(folder)
        finally:
            os.close(marker)


def _owned(parent: Path) -> tuple[Path, int]:
    """Create a folder with a locked marker file. Return the folder and the marker's file descriptor."""
    for _ in range(100):
        folder = parent / f"{PREFIX}{secrets.token_hex(16)}"
        os.mkdir(folder, 0o700)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
        try:
            marker = os.open(folder / OWNER, flags, 0o666)
        except FileNotFoundError:  # another writer deleted the empty folder, as left by a killed process
            continue
        try:
            os.write(marker, MARK)
            if _lock(marker) and os.path.exists(folder / OWNER):
                return folder, marker
        except BaseException:
            os.close(marker)
            with suppress(OSError):
                _discard(folder)
            raise
        os.close(marker)
    raise OSError(errno.EBUSY, f"{parent}, where other processes delete each new folder")


def sweep(parent: Path) -> None:
    """Delete what killed writers left in `parent`: folders with our name and an unlocked marker."""
    if sys.platform == "win32":  # it has no locks that show if the writer is alive
        return
    with suppress(OSError):
        for found in list(os.scandir(parent)):
            if _PARTIAL.fullmatch(found.name) and found.is_dir(follow_symlinks=False):
                with suppress(OSError):
                    _sweep_one(Path(found.path))


def _sweep_one(folder: Path) -> None:
    try:
        marker = os.open(folder / OWNER, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        os.rmdir(folder)  # the writer was killed before it wrote anything; fails if the folder is not empty
        return
    try:
        ours = stat.S_ISREG(os.fstat(marker).st_mode) and os.read(marker, len(MARK) + 1) in (MARK, b"")
        if not ours or not _lock(marker, supported=True):
            return
        with signals_delayed():
            for replaced in (folder / _REPLACED).glob("*"):  # the writer was killed between two renames
                if not os.path.lexists(folder.parent / replaced.name):
                    os.replace(replaced, folder.parent / replaced.name)
            _discard(folder)
    finally:
        os.close(marker)


def _discard(folder: Path) -> None:
    """Delete a private folder, the marker last: if killed here, `sweep` still recognises the rest."""
    for entry in list(os.scandir(folder)):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        elif entry.name != OWNER:
            os.unlink(entry.path)
    with suppress(FileNotFoundError):
        os.unlink(folder / OWNER)
    os.rmdir(folder)


def _lock(handle: int, *, supported: bool = False) -> bool:
    """Lock an open file without waiting. Return whether it succeeded; without locks, `not supported`."""
    if sys.platform == "win32":
        return not supported
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return not supported
    return True


@contextmanager
def locked_file(path: Path) -> Iterator[bool]:
    """Lock a file against other callers of this function inside the block. A kill ends the lock, too.

    Yields:
        Whether it is locked. False if another process has locked or deleted it. True on systems without
        locks.
    """
    with ExitStack() as stack:
        try:
            handle = os.open(path, os.O_RDONLY)
            stack.callback(os.close, handle)
            mine = _lock(handle) and os.path.samestat(os.fstat(handle), os.stat(path))
        except FileNotFoundError:
            mine = False
        yield mine


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a folder against other writers of this library, for the few renames inside the block.

    Raises:
        OSError: Another process keeps the lock for a minute.
    """
    if sys.platform == "win32":
        yield
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for _ in range(_TRIALS):
            if _lock(handle):
                break
            time.sleep(_PAUSE)
        else:
            raise OSError(errno.EBUSY, "a folder that another process has locked for a minute")
        yield
        os.fsync(handle)
    finally:
        os.close(handle)


def _put(written: Path, path: Path) -> None:
    """Move a file to its final path. Its data files are moved first."""
    kept = {file.name for file in written.parent.iterdir()} - {OWNER, written.name}
    moved = []
    try:
        for name in sorted(kept):
            if not os.path.lexists(
                path.parent / name
            ):  # equal names mean equal files: they contain checksums
                os.replace(written.parent / name, path.parent / name)
                moved.append(path.parent / name)
        os.replace(written, path)
    except BaseException:
        for file in moved:
            os.unlink(file)
        raise
    data = re.compile(re.escape(path.name) + r"\.[0-9a-f]{8,64}\.data")
    for stale in [e.path for e in os.scandir(path.parent) if data.fullmatch(e.name) and e.name not in kept]:
        os.unlink(stale)


def _put_folder(written: Path, path: Path, aside: Path) -> None:
    """Move a folder to its final path: by one exchange, or by two renames if the system has no exchange.

    If the process is killed between the renames, the old folder is in `aside`, and the next write restores
    it.
    """
    if os.path.isdir(path) and not path.is_symlink() and not any(path.iterdir()):
        path.rmdir()
    if not os.path.lexists(path):
        os.replace(written, path)
        return
    if not os.path.isdir(path):
        raise NotADirectoryError(errno.ENOTDIR, "a file where the folder should be")
    if _exchange(written, path):
        return
    aside.mkdir()
    try:
        os.replace(path, aside / path.name)
        os.replace(written, path)
    except BaseException:
        if os.path.exists(aside / path.name) and not os.path.exists(path):
            os.replace(aside / path.name, path)
        raise


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two paths in one step. Return False if the system or the file system cannot."""
    if sys.platform != "linux":
        return False
    call: Callable[..., int] | None = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if call is None:
        return False
    if call(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(other))


def flush(folder: Path) -> None:
    """Write all files of a folder to disk, with the permissions that new files get there."""
    mode = 0o666
    with suppress(OSError):
        marker = folder / OWNER if os.path.exists(folder / OWNER) else folder.parent / OWNER
        mode = stat.S_IMODE(marker.stat().st_mode)
    for place, _, names in os.walk(folder):
        for name in names:
            file = Path(place) / name
            if file.is_symlink() or name == OWNER:
                continue
            os.chmod(file, mode)  # some writers make files that only the owner can read
            with file.open("rb+") as opened:
                os.fsync(opened.fileno())
        sync(Path(place))


def sync(folder: Path) -> None:
    """Write a folder's list of names to disk (fsync)."""
    if sys.platform == "win32":
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def signals_delayed() -> Iterator[None]:
    """Delay Ctrl-C and SIGTERM inside the block until its end. Only the main thread receives signals.

    A SIGTERM without a handler still ends the process at once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[int] = []
    before: dict[signal.Signals, Any] = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        if callable(signal.getsignal(number)):
            before[number] = signal.signal(number, lambda which, frame: caught.append(which))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for first in caught[:1]:
        signal.raise_signal(first)
