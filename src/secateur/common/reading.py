"""Read files that strangers may have made: only regular ones, up to a size, and JSON of bounded depth."""

from __future__ import annotations

import io
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, BinaryIO, TypeVar

from pydantic import Field, ValidationError

from secateur.errors import SecateurError

DEPTH = 64
"""The most lists and mappings in each other."""

VALUES = 8_000_000
"""The most values in one text: each takes memory that its few characters do not show."""

CONTAINERS = 1_000_000
"""The most lists and mappings in one text."""

Count = Annotated[int, Field(ge=0, le=1 << 48)]
"""A number of things, as files hold it."""

T = TypeVar("T")

_STRINGS = re.compile(rb'"(?:[^"\\]|\\.)*"?', re.DOTALL)
_DIGITS = re.compile(rb"[0-9]{401}")
_OPENING = frozenset(b"[{")


@contextmanager
def opened(
    path: str | os.PathLike[str], where: str, error: type[SecateurError], what: str = "a file"
) -> Iterator[BinaryIO]:
    """Open a regular file for reading. Pipes and devices, which may never end, are refused.

    Args:
        path: The file.
        where: How messages begin.
        error: The class of errors.
        what: What the file should be, for messages.

    Raises:
        SecateurError: There is none, or it cannot be read.
    """
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError) as refused:
        why = getattr(refused, "strerror", None) or refused
        raise error(_unreadable(where, what, why)) from refused
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise error(_unreadable(where, what, "a folder, a pipe or a device"))
    with io.BufferedReader(_Checked(handle, lambda why: error(_unreadable(where, what, why)))) as file:
        yield file


class _Checked(io.FileIO):
    """An open file that says what the system refuses, such as a block of a broken disk, as our own error."""

    def __init__(self, handle: int, to_error: Callable[[object], SecateurError]) -> None:
        super().__init__(handle, "rb")
        self._to_error = to_error

    def readinto(self, buffer: Any) -> int:
        return self._try(super().readinto, buffer)

    def readall(self) -> bytes:
        return self._try(super().readall)

    def _try(self, read: Callable[..., T], *args: Any) -> T:
        try:
            return read(*args)
        except OSError as refused:
            raise self._to_error(refused.strerror) from refused


def _unreadable(where: str, what: str, why: object) -> str:
    return f"{where}: expected {what}, got no file that can be read ({why}). Check the path."


def read_bytes(
    path: str | os.PathLike[str],
    most: int,
    where: str,
    error: type[SecateurError],
    what: str = "a file",
    *,
    first: int | None = None,
) -> bytes:
    """Read a file of at most `most` bytes, or only its first ones; see `opened`.

    Raises:
        SecateurError: It cannot be read, or is larger.
    """
    with opened(path, where, error, what) as file:
        size = os.fstat(file.fileno()).st_size
        if first is None and size > most:
            raise error(f"{where}: expected {what} of at most {most:,} bytes, got {size:,}. Check the path.")
        return file.read(min(size, most) if first is None else first)


def read_text(
    path: str | os.PathLike[str], most: int, where: str, error: type[SecateurError], what: str = "a file"
) -> str:
    """Read a text in UTF-8; raises as `read_bytes` does."""
    try:
        return read_bytes(path, most, where, error, what).decode("utf-8")
    except UnicodeDecodeError as refused:
        raise error(
            f"{where}: expected {what} in UTF-8, got other bytes ({refused}). Check the path."
        ) from refused


def check_json(text: bytes) -> None:
    """Check how deep and how large a JSON text is, before anything is made from it.

    Raises:
        ValueError: It is nested too deep, or has too many values or digits.

    Example:
        >>> check_json(b"[" * 65 + b"]" * 65)
        Traceback (most recent call last):
        ValueError: more than 64 lists and mappings in each other
    """
    bare = _STRINGS.sub(b"", text)
    brackets = bare.translate(None, bytes(set(range(256)) - set(b"[]{}")))
    if len(brackets) > 2 * CONTAINERS:
        raise ValueError(f"more than {CONTAINERS:,} lists and mappings")
    if bare.count(b",") > VALUES:
        raise ValueError(f"more than {VALUES:,} values")
    if _DIGITS.search(bare):
        raise ValueError("a number of more than 400 digits")
    depth = 0
    for bracket in brackets:
        depth += 1 if bracket in _OPENING else -1
        if depth > DEPTH:
            raise ValueError(f"more than {DEPTH} lists and mappings in each other")


def parse_json(text: str | bytes, *, constants: bool = False) -> Any:
    """Parse a JSON text that `check_json` accepts.

    Args:
        text: The text, in UTF-8.
        constants: Whether ``NaN`` and ``Infinity`` may stand for numbers.

    Raises:
        ValueError: It is no JSON, is too deep or too large, or gives a name twice in one mapping.
    """
    raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    check_json(raw)
    constant = float if constants else _refuse_constant
    return json.loads(raw, parse_constant=constant, object_pairs_hook=_each_once)


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A mapping, which names each value once: readers do not agree on which of two counts."""
    found = dict(pairs)
    if len(found) != len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{twice[:80]!r} twice in one mapping")
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def complaint(error: ValidationError) -> str:
    """The first of pydantic's complaints, and where it is."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    place = ".".join(str(part)[:80] for part in first["loc"][:6])
    message = first["msg"].removeprefix("Value error, ")[:300]
    return f"{message} (in {place})" if place else message
