"""Read CIFAR's batches, which are pickles, without running code that a pickle could name."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pickle import (
    ADDITEMS,
    BUILD,
    DICT,
    EMPTY_SET,
    FROZENSET,
    SETITEM,
    SETITEMS,
    _Unpickler,
)
from typing import TYPE_CHECKING, Any

from secateur.errors import CalibrationError

if TYPE_CHECKING:
    import numpy as np

PIXELS = 3 * 32 * 32
_PYTHONS: Any = _Unpickler
STEPS = 2_000_000
"""The most steps of a pickle. The largest published batch, with 50,000 images, has 350,000."""

_NUMPY = {
    (f"{package}.multiarray", "_reconstruct")
    for package in ("numpy.core", "numpy._core")
}  # fmt: skip


def unpickled(raw: bytes, where: str) -> dict[str, Any]:
    """Return what a batch holds: a dictionary of lists, texts and arrays of bytes.

    Of all that a pickle may name, only NumPy's arrays are known, and even these are not made by NumPy's code
    but put together here from their bytes. Everything else is refused.

    Args:
        raw: The content of the file.
        where: How messages begin.

    Raises:
        CalibrationError: It names anything else, or is damaged.
    """
    reader = _reader(raw)
    try:
        found = reader.load()
    except Exception as error:  # a damaged pickle fails in any way
        raise CalibrationError(
            f"{where}: expected a batch of CIFAR, got {_said(error)}. Take the file from the data set's own "
            "archive."
        ) from error
    if not isinstance(found, dict):
        raise CalibrationError(
            f"{where}: expected a batch of CIFAR, got a {type(found).__name__}. Take the file from the data "
            "set's own archive."
        )
    return {key.decode("latin-1") if isinstance(key, bytes) else key: v for key, v in found.items()}


def _said(error: Exception) -> str:
    return str(error)[:120] if isinstance(error, _RefusedError) else "a damaged file"


class _RefusedError(Exception):
    """The pickle contains something that no batch of CIFAR contains."""


class _Steps(dict[int, Any]):
    """The table of a reader's actions for each code of a pickle, with a limit on steps and without sets.

    One byte of a pickle can make an object of a hundred bytes. Sets compute hashes of their entries, and for
    deeply nested tuples that takes for ever, or the whole stack.
    """

    def __init__(self, known: Mapping[int, Any]) -> None:
        super().__init__(known)
        self.left = STEPS

    def __getitem__(self, code: int) -> Any:
        self.left -= 1
        if self.left < 0:
            raise _RefusedError(f"a pickle of more than {STEPS:,} steps")
        if code in (EMPTY_SET[0], ADDITEMS[0], FROZENSET[0]):
            raise _RefusedError("a pickle with a set")
        return super().__getitem__(code)


def _require_texts(keys: list[Any]) -> None:
    """Check the keys of a dictionary before their hashes are computed."""
    if not all(type(key) in (bytes, str) for key in keys):
        raise _RefusedError("a dictionary whose keys are no texts")


def _reader(raw: bytes) -> Any:
    """Return a reader with new classes, so that one file cannot change how the next one is read."""

    class Dtype:
        def __init__(self, code: object = None, *_: object) -> None:
            self.code = code.decode("latin-1") if isinstance(code, bytes) else code

        def __setstate__(self, state: object) -> None:
            """Ignore the byte order: single bytes have none."""

    class Array:
        def __init__(self) -> None:
            self.pixels: bytes = b""

        def __setstate__(self, state: Any) -> None:
            _, shape, dtype, fortran, content = state
            if not isinstance(dtype, Dtype) or dtype.code not in ("u1", "|u1") or fortran:
                raise _RefusedError("an array that is not of bytes")
            sizes = isinstance(shape, tuple) and all(type(size) is int for size in shape)
            if not sizes or not isinstance(content, bytes) or shape != (len(content) // PIXELS, PIXELS):
                raise _RefusedError("an array that is no rows of 3,072 bytes")
            if len(content) != shape[0] * PIXELS:
                raise _RefusedError("an array that is cut short")
            self.pixels = content

    left = [len(raw)]

    def reconstruct(*_: object) -> Array:
        return Array()

    def encoded(text: str, encoding: str) -> bytes:  # how Python 3 writes bytes for Python 2
        if encoding not in ("latin1", b"latin1"):
            raise _RefusedError("bytes in another encoding")
        left[0] -= len(text)
        if left[0] < 0:  # one text again and again
            raise _RefusedError("more bytes than it holds")
        return text.encode("latin-1")

    known: dict[tuple[str, str], Any] = {
        ("_codecs", "encode"): encoded,
        **dict.fromkeys(_NUMPY, reconstruct),
        ("numpy", "ndarray"): "ndarray",
        ("numpy", "dtype"): Dtype,
    }

    # In Python: the reader in C can be made to reserve any amount of memory.
    class Reader(_PYTHONS):  # type: ignore[misc]  # its methods have no types
        def find_class(self, module: str, name: str) -> Any:
            if (module, name) not in known:
                raise _RefusedError(f"a pickle that asks for {module[:40]}.{name[:40]}")
            return known[module, name]

        def persistent_load(self, pid: object) -> Any:
            raise _RefusedError("a pickle that asks for what is outside of it")

        def load_build(self) -> None:
            if type(self.stack[-2]) not in (Array, Dtype):
                raise _RefusedError("a pickle that changes what is no array")
            super().load_build()

        def load_setitem(self) -> None:
            _require_texts(self.stack[-2:-1])
            super().load_setitem()

        def load_setitems(self) -> None:
            _require_texts(self.stack[::2])
            super().load_setitems()

        def load_dict(self) -> None:
            _require_texts(self.stack[::2])
            super().load_dict()

        dispatch = _Steps(
            _PYTHONS.dispatch
            | {
                BUILD[0]: load_build,
                SETITEM[0]: load_setitem,
                SETITEMS[0]: load_setitems,
                DICT[0]: load_dict,
            }
        )

    return Reader(io.BytesIO(raw), encoding="bytes")


def batch_of(raw: bytes, label: str, where: str) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return the images [N, 3, 32, 32] as bytes, and the labels [N], of a batch in Python's form.

    Args:
        raw: The content of the file.
        label: The key of the labels: ``labels`` or ``fine_labels``.
        where: How messages begin.

    Raises:
        CalibrationError: The file is damaged, or is something else.
    """
    import numpy as np

    found = unpickled(raw, where)
    pixels, labels = getattr(found.get("data"), "pixels", None), found.get(label)
    if not isinstance(pixels, bytes) or not isinstance(labels, list):
        raise CalibrationError(
            f"{where}: expected the entries data and {label}, got {_listed(found)}. Take the "
            "file from the data set's own archive."
        )
    images = np.frombuffer(pixels, np.uint8).reshape(-1, 3, 32, 32)
    if len(labels) != len(images) or not all(type(y) is int and 0 <= y < 1000 for y in labels):
        raise CalibrationError(
            f"{where}: expected {len(images)} classes from 0, one for each image, got others. Take "
            "the file from the data set's own archive."
        )
    return images, np.array(labels, np.int64)


def _listed(found: Mapping[str, Any]) -> str:
    return ", ".join(f"{name[:20]!r}" for name in sorted(found)[:6]) or "nothing"


def rows_of(raw: bytes, before: int, where: str) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return images and labels of a batch in the binary form: rows of labels and pixels.

    Args:
        raw: The content of the file.
        before: Labels in a row; the last one counts: 1 for CIFAR-10, 2 for CIFAR-100.
        where: How messages begin.

    Raises:
        CalibrationError: The file does not hold whole rows.
    """
    import numpy as np

    if not raw or len(raw) % (before + PIXELS):
        raise CalibrationError(
            f"{where}: expected rows of {before + PIXELS:,} bytes, got {len(raw):,} bytes. Take the "
            "file from the data set's own archive."
        )
    rows = np.frombuffer(raw, np.uint8).reshape(-1, before + PIXELS)
    return rows[:, before:].reshape(-1, 3, 32, 32), rows[:, before - 1].astype(np.int64)
