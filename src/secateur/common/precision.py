"""Products in full float32 while something is measured."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch

_COARSE = ("tf32", "bf16")


def _set_full() -> list[Callable[[], object]]:
    """Make all products of float32 exact to rounding; returns what restores the settings, last step first.

    Torch has older and newer settings for the same. It refuses to read an older one where the newer ones
    differ from it, and the exporter reads them. So all are set.
    """
    steps: list[Callable[[], object]] = []

    def refine(owner: Any, to: str) -> None:
        before = getattr(owner, "fp32_precision", None)
        if before in _COARSE:
            owner.fp32_precision = to
            steps.append(partial(setattr, owner, "fp32_precision", before))

    backends = torch.backends
    # First what each operator has that has no setting of its own.
    for group in (backends, backends.cudnn, backends.mkldnn):
        refine(group, "none")
    with suppress(RuntimeError):
        products = torch.get_float32_matmul_precision()
        if products != "highest":
            torch.set_float32_matmul_precision("highest")
            steps.append(partial(torch.set_float32_matmul_precision, products))
    steps.append(_refine_cudnn())
    for group, names in ((backends.cuda, ("matmul",)), (backends.mkldnn, ("matmul", "conv", "rnn"))):
        for name in names:
            refine(getattr(group, name, None), "ieee")
    return steps[::-1]


def _refine_cudnn() -> Callable[[], None]:
    """Set cuDNN to full float32; returns what restores its settings."""
    cudnn: Any = torch.backends.cudnn
    operators = [getattr(cudnn, name) for name in ("conv", "rnn") if hasattr(cudnn, name)]
    newer = [(each, each.fp32_precision) for each in operators if hasattr(each, "fp32_precision")]
    before = True  # the default, where the newer settings hide it
    with suppress(RuntimeError):
        before = cudnn.allow_tf32
    cudnn.allow_tf32 = False

    def restore() -> None:
        cudnn.allow_tf32 = before
        for each, precision in newer:
            if each.fp32_precision != precision:
                each.fp32_precision = precision

    return restore


class _Calls:
    """The calls that are inside now, in all threads: torch has one setting for the process.

    Attributes:
        count: How many are inside.
        steps: What restores the settings.
    """

    lock = threading.Lock()
    count = 0
    steps: list[Callable[[], object]] | None = None


def _restore(steps: list[Callable[[], object]]) -> None:
    for step in steps:
        step()


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
        if _Calls.steps is None:  # also while another thread trains: its speed matters less than these sums
            _Calls.steps = _set_full()
    try:
        yield
    finally:
        with _Calls.lock:
            _Calls.count -= 1
            if not _Calls.count and _Calls.steps is not None:
                _restore(_Calls.steps)
                _Calls.steps = None


@contextmanager
def as_called() -> Iterator[None]:
    """Inside, the settings that the user's code had when it called: for what is timed or trained."""
    with _Calls.lock:
        inside = _Calls.steps is not None
        if _Calls.steps is not None:
            _restore(_Calls.steps)
            _Calls.steps = None
    try:
        yield
    finally:
        with _Calls.lock:
            if inside and _Calls.count and _Calls.steps is None:
                _Calls.steps = _set_full()
