"""Faster captures of recurrent layers: the shapes of their results are given, not computed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_LAYERS = ("lstm", "gru", "rnn_tanh", "rnn_relu")


@contextmanager
def shapes_known() -> Iterator[None]:
    """Inside, a capture need not run recurrent layers step by step to learn the shapes of their results.

    The Python kernels of these operators are replaced by a function that only makes results of the right
    shape. In a version of PyTorch without such kernels nothing changes, and the capture is slower.
    """
    operators = [
        (getattr(getattr(torch.ops.aten, name), overload), results)
        for name in _LAYERS
        for overload, results in (("input", _results), ("data", _packed_results))
    ]
    before = [(op, dict(own), new) for op, new in operators if (own := getattr(op, "py_kernels", None))]
    try:
        for op, kernels, results in before:
            _set(op, dict.fromkeys(kernels, results))
        yield
    finally:
        for op, kernels, _ in before:
            _set(op, kernels)


def _set(op: Any, kernels: dict[Any, Any]) -> None:
    op.py_kernels.update(kernels)
    op._dispatch_cache.clear()


def _results(
    input: Tensor,
    hx: Tensor | Sequence[Tensor],
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, ...]:
    """Make results of the right shapes, strides and dtypes. They require a gradient if a parameter does."""
    states = [hx] if isinstance(hx, Tensor) else list(hx)
    steps = input.transpose(0, 1) if batch_first else input
    width = states[0].shape[-1] * (2 if bidirectional else 1)
    zero = sum(p.sum() for p in params) * 0  # requires a gradient if a parameter does
    out = input.new_zeros((*steps.shape[:-1], width)) + zero
    return (out.transpose(0, 1) if batch_first else out, *(torch.zeros_like(s) + zero for s in states))


def _packed_results(
    data: Tensor, batch_sizes: Tensor, hx: Any, params: Any, *settings: Any
) -> tuple[Tensor, ...]:
    """Make results of the right shapes for packed sequences. [rows, features]"""
    biases, layers, dropout, train, bidirectional = settings
    out, *states = _results(data[:, None], hx, params, biases, layers, dropout, train, bidirectional, False)
    return (out[:, 0], *states)
