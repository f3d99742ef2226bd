"""Products in full float32 while something is measured."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

_PLACES = (("cuda", "matmul"), ("cudnn", "conv"), ("cudnn", "rnn"),
           ("mkldnn", "matmul"), ("mkldnn", "conv"), ("mkldnn", "rnn"))  # fmt: skip
"""Where newer versions of torch keep a setting ``fp32_precision`` in `torch.backends`."""


class _Settings:
    """How precise torch makes float32 products now.

    Older settings and newer ones stand for the same. Torch refuses to read the older ones where only the
    newer ones were set, so what cannot be read is left to the others.
    """

    def __init__(self) -> None:
        self._products: str | None = None
        with suppress(RuntimeError):
            self._products = torch.get_float32_matmul_precision()
        self._cudnn = torch.backends.cudnn.allow_tf32
        self._newer = [(place, place.fp32_precision) for place in _newer()]

    def set_full(self) -> None:
        """Make all products of float32 exact to rounding."""
        if self._products is not None:
            torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        for place in _newer():
            if place.fp32_precision in ("tf32", "bf16"):
                place.fp32_precision = "ieee"

    def restore(self) -> None:
        """Set all that this object has read."""
        if self._products is not None:
            torch.set_float32_matmul_precision(self._products)
        torch.backends.cudnn.allow_tf32 = self._cudnn
        for place, before in self._newer:
            if place.fp32_precision != before:
                place.fp32_precision = before


def _newer() -> list[Any]:
    places = (getattr(getattr(torch.backends, group), name, None) for group, name in _PLACES)
    return [place for place in places if hasattr(place, "fp32_precision")]


class _Calls:
    """The calls that are inside now, in all threads: torch has one setting for the process."""

    lock = threading.Lock()
    count = 0
    before: _Settings | None = None


@contextmanager
def full_precision() -> Iterator[None]:
    """Inside, products of float32 tensors have 23 bits, on a GPU too. Also a decorator.

    With TF32 or bfloat16, which many training scripts switch on, a product has 10 or 7. A sum of squares of
    such products is too coarse to solve a refit from. The settings of before are restored. What is timed or
    trained inside has the settings of before too; see `as_called`.

    Example:
        >>> torch.set_float32_matmul_precision("high")
        >>> with full_precision():
        ...     torch.get_float32_matmul_precision()
        'highest'
        >>> torch.get_float32_matmul_precision()
        'high'
        >>> torch.set_float32_matmul_precision("highest")
    """
    with _Calls.lock:
        _Calls.count += 1
        if _Calls.count == 1:
            _Calls.before = _Settings()
            _Calls.before.set_full()
    try:
        yield
    finally:
        with _Calls.lock:
            _Calls.count -= 1
            if not _Calls.count and _Calls.before is not None:
                _Calls.before.restore()
                _Calls.before = None


@contextmanager
def as_called() -> Iterator[None]:
    """Inside, the settings that the user's code had when it called: for what is timed or trained."""
    before = _Calls.before
    if before is None:
        yield
        return
    before.restore()
    try:
        yield
    finally:
        with _Calls.lock:
            if _Calls.before is before:
                before.set_full()
