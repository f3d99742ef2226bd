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
"""What the folders of unfinished writes are called, with 32 random digits behind it."""

_PARTIAL = re.compile(re.escape(PREFIX) + "[0-9a-f]{32}")
OWNER, MARK = (
    ".secateur-owner",
    b"secateur writes here; the next write deletes this folder once its writer is gone\n",
)
_REPLACED = "replaced"
_TRIALS, _PAUSE = 12_000, 0.005
"""How often a writer waits for others in the same folder, and how long. [s] Each needs a few renames."""


@contextmanager
def replacing(
    path: Path, error: type[SecateurError] = ArtefactError, *, parents: bool = False
) -> Iterator[Path]:
    """A place for a new file of this name, which takes the place of `path` if the block succeeds.

    So a reader finds the old file or the new one, whole, also after a crash. A link at `path` is replaced;
    what it points to stays as it is. Other files that the block writes beside the new one, named
    ``<name>.<checksum>.data``, are moved first; those of the old file are deleted last.

    Args:
        path: The file.
        error: The class of errors about files that cannot be written.
        parents: Whether to make the folder of `path`, if there is none.

    Raises:
        SecateurError: Nothing can be written there. `path` is as it was.

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
            with locked(path.parent), undisturbed():
                _put(folder / path.name, path)


def check_replaceable(path: Path, called: str = "the file") -> None:
    """Refuse to put a file where a folder, a pipe or a device is, or a link to a pipe or a device.

    Those are no files that a newer version could replace: ``/dev/stdout`` would be gone for all programs.

    Raises:
        OSError: There is one.
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
    """An empty folder, which takes the place of the one at `path` if the block succeeds.

    Raises:
        SecateurError: Nothing can be written there. `path` is as it was.
    """
    with os_errors_as(path, error):
        path.parent.mkdir(parents=True, exist_ok=True)
        with private_folder(path.parent) as folder:
            written = folder / "new"
            written.mkdir()
            yield written
            flush(written)
            with locked(path.parent), undisturbed():
                _put_folder(written, path, folder / _REPLACED)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `path` at the end: all of it or nothing.

    Raises:
        ArtefactError: If there is something at `path`, other than an empty folder, or nothing can be written.
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
    """What the system refused, and what to do; None if it was something else."""
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
    said = str(getattr(refused, "strerror", None) or refused).splitlines()
    got = known.get(number or 0) or (said[0][:200] if said else type(refused).__name__)
    if "\0" in str(path):
        got = "a path with a null character"
    elif isinstance(refused, SafetensorError) and "os error 28" in str(refused):
        got = known[errno.ENOSPC]
    free = ""
    with suppress(OSError, ValueError, StopIteration):
        there = next(place for place in (path, *path.absolute().parents) if os.path.exists(place))
        free = f" ({shutil.disk_usage(there).free:,} bytes are free there)"
    advice = "Make room, or name another." if "full" in got else "Name another."
    return f"{path}: expected a place that can be written to, got {got}{free}. {advice}"


@contextmanager
def private_folder(parent: Path) -> Iterator[Path]:
    """A new folder in `parent` that only this process uses. It is deleted after the block.

    Before that, what killed processes left there is deleted.

    Raises:
        OSError: `parent` cannot be written to.
    """
    sweep(parent)
    folder, marker = _owned(parent)
    try:
        yield folder
    finally:
        try:
            with undisturbed(), suppress(OSError):
                _discard(folder)
        finally:
            os.close(marker)


def _owned(parent: Path) -> tuple[Path, int]:
    """A new folder with a marker that is locked, and the marker's file descriptor."""
    for _ in range(100):
        folder = parent / f"{PREFIX}{secrets.token_hex(16)}"
        os.mkdir(folder, 0o700)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
        try:
            marker = os.open(folder / OWNER, flags, 0o666)
        except FileNotFoundError:  # a writer beside this one took the empty folder for litter
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
    raise OSError(errno.EBUSY, f"{parent} is swept again and again")


def sweep(parent: Path) -> None:
    """Delete what killed writers left in a folder: what bears our name, holds our mark and has no owner."""
    if sys.platform == "win32":  # no locks that show whether a writer lives
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
        os.rmdir(folder)  # killed before it wrote anything; fails where the folder holds something
        return
    try:
        ours = stat.S_ISREG(os.fstat(marker).st_mode) and os.read(marker, len(MARK) + 1) in (MARK, b"")
        if not ours or not _lock(marker, supported=True):
            return
        with undisturbed():
            for replaced in (folder / _REPLACED).glob("*"):  # killed between two renames
                if not os.path.lexists(folder.parent / replaced.name):
                    os.replace(replaced, folder.parent / replaced.name)
            _discard(folder)
    finally:
        os.close(marker)


def _discard(folder: Path) -> None:
    """Delete a private folder. The marker goes last: whoever is killed here leaves what can be swept."""
    for entry in list(os.scandir(folder)):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        elif entry.name != OWNER:
            os.unlink(entry.path)
    with suppress(FileNotFoundError):
        os.unlink(folder / OWNER)
    os.rmdir(folder)


def _lock(handle: int, *, supported: bool = False) -> bool:
    """Lock an open file, without waiting. Where there are no locks, return `not supported`."""
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
    """Keep other callers of this function away from a file inside the block. A kill ends that, too.

    Yields:
        Whether it is so; False if another one has the file, or deleted it. True where there are no locks.
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
    """Keep other writers of this library out of a folder for the few renames inside the block.

    Raises:
        OSError: Another one keeps it for a minute.
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
    """Move a new file, and before it its data files, to their final place."""
    kept = {file.name for file in written.parent.iterdir()} - {OWNER, written.name}
    moved = []
    try:
        for name in sorted(kept):
            if not os.path.lexists(path.parent / name):  # else it is the same: names hold checksums
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
    """Move a new folder to its final place: by one exchange, or two renames where the system has none.

    Who is killed between the two leaves the old folder in `aside`, from where the next write puts it back.
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
    """Let two paths change places at once; False where the system or the file system cannot."""
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
    """Write all files of a folder to disk, and let everybody read them who may read new files there."""
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
    """Write a folder's list of names to disk."""
    if sys.platform == "win32":
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Ctrl-C and SIGTERM inside the block take effect behind it. Signals reach the main thread only.

    A SIGTERM that nobody handles ends the process at once, as ever.
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
