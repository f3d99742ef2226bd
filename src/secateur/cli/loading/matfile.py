"""Read arrays from MATLAB's files of version 5, such as SVHN's, with bounds on what they unpack to."""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from secateur.cli.loading.arrays import LARGEST_PACKED, MOST_PACKED
from secateur.errors import CalibrationError

if TYPE_CHECKING:
    import numpy as np

AXES = 32
"""The most axes of an array."""

_MATRIX, _PACKED = 14, 15
_NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
"""Types of stored numbers by their code."""


def matrices(raw: bytes, names: tuple[str, ...], where: str) -> dict[str, np.ndarray[Any, Any]]:
    """Return the named arrays of numbers, in MATLAB's order of axes.

    Source: MathWorks, MAT-File Format, on version 5.

    Args:
        raw: The content of the file.
        names: The arrays that are wanted.
        where: How messages begin.

    Raises:
        CalibrationError: The file is damaged, is of another version, or lacks an array.
    """
    try:
        found = dict(_matrices(raw, names))
    except (ValueError, struct.error, zlib.error, LookupError) as error:
        raise CalibrationError(
            f"{where}: expected MATLAB's version 5, got one that cannot be read ({str(error)[:80]}). "
            "Take the file from the data set's own page."
        ) from error
    if missing := [name for name in names if name not in found]:
        raise CalibrationError(
            f"{where}: expected the arrays {', '.join(names)}, got no {missing[0]}. Check the file."
        )
    return found


def _matrices(raw: bytes, names: tuple[str, ...]) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    order = {b"IM": "<", b"MI": ">"}.get(raw[126:128])
    if order is None:
        raise ValueError("no header of version 5")
    at = 128
    while at + 8 <= len(raw):
        kind, size = struct.unpack_from(order + "II", raw, at)
        body = raw[at + 8 : at + 8 + size]
        if len(body) < size:
            raise ValueError("it is cut short")
        at += 8 + size
        if kind == _PACKED:
            unpack = zlib.decompressobj()
            head = unpack.decompress(body, 8)
            kind, size = struct.unpack(order + "II", head)
            if size > LARGEST_PACKED + MOST_PACKED * len(raw):
                raise ValueError(f"an array of {size:,} bytes packed into {len(body):,}")
            body = unpack.decompress(unpack.unconsumed_tail, size)
        if kind == _MATRIX and (named := _matrix(body, order, names)) is not None:
            yield named


def _matrix(body: bytes, order: str, names: tuple[str, ...]) -> tuple[str, np.ndarray[Any, Any]] | None:
    """Return one array with its name; None if it is not wanted."""
    import numpy as np

    parts = _parts(body, order)
    next(parts)  # flags, which say of what class MATLAB makes the numbers
    _, dims = next(parts)
    _, name = next(parts)
    text = name.decode("latin-1")
    if text not in names:
        return None
    if len(dims) > 4 * AXES:
        raise ValueError(f"{text} with {len(dims) // 4:,} axes")
    kind, content = next(parts)
    shape = struct.unpack(order + f"{len(dims) // 4}i", dims[: len(dims) // 4 * 4])
    dtype = np.dtype(order + _NUMBERS[kind])
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != len(content):
        raise ValueError(f"{text} {list(shape)} in {len(content):,} bytes")
    return text, np.frombuffer(content, dtype).reshape(shape, order="F")


def _parts(body: bytes, order: str) -> Iterator[tuple[int, bytes]]:
    """Yield the parts of an element: the code of a type, and bytes."""
    at = 0
    while True:
        (kind,) = struct.unpack_from(order + "I", body, at)
        if kind >> 16:  # four bytes or fewer, in the tag itself
            size, start, after = kind >> 16, at + 4, at + 8
            kind &= 0xFFFF
            if size > 4:
                raise ValueError("a small part of more than four bytes")
        else:
            (size,) = struct.unpack_from(order + "I", body, at + 4)
            start = at + 8
            after = start + -(-size // 8) * 8
        if start + size > len(body):
            raise ValueError("an array that is cut short")
        yield kind, body[start : start + size]
        at = after
