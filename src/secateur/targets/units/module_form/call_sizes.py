"""The sizes in the arguments of a call, as in ``x.view(2, -1, 8)`` or ``torch.zeros(size=(8, 1))``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a call."""

CREATORS = ("zeros", "ones", "empty", "rand", "randn", "full")
"""Functions that make a tensor of a size."""
_SIZE_WORDS = ("size", "shape", "sizes", "dims", "repeats")


def sizes_in(
    name: str, args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[list[int], int, Callable[[list[int]], Arguments]] | None:
    """Return the sizes in a call, the axis of the first one, and a function that builds the call with others.

    None if the call passes no sizes.
    """
    start = 0 if name in CREATORS else 2 if name == "unflatten" else 1
    if name in ("randint", "normal"):  # the sizes come after one or two numbers
        start = next((k for k, value in enumerate(args) if _is_sizes(value)), len(args))
    given = list(args[start:])
    if given and is_size(given[0]):
        values = given

        def spread(new: list[int]) -> Arguments:
            return (*args[:start], *new), kwargs

        return values, 0, spread
    if given and _is_sizes(given[0]):
        values = list(given[0])

        def packed(new: list[int]) -> Arguments:
            return (*args[:start], tuple(new), *args[start + 1 :]), kwargs

        return values, _offset(name, args, kwargs, len(values)), packed
    for word in _SIZE_WORDS:
        if _is_sizes(kwargs.get(word)):
            values = list(kwargs[word])

            def named(new: list[int], word: str = word) -> Arguments:
                return tuple(args), {**kwargs, word: tuple(new)}

            return values, _offset(name, args, kwargs, len(values)), named
    return None


def _offset(name: str, args: Sequence[Any], kwargs: dict[str, Any], count: int) -> int:
    """Return the axis of the result to which the first size belongs."""
    if name == "unflatten":
        dim = int(kwargs.get("dim", args[1] if len(args) > 1 else 0))
        return dim % int(args[0].ndim)
    return max(int(args[0].ndim) - count, 0) if name == "tile" else 0


def is_size(value: Any) -> bool:
    """Whether a value is a size. Under ``torch.jit.trace``, sizes are tensors."""
    if isinstance(value, torch.Tensor):
        return is_traced(value) and not value.is_floating_point()
    return isinstance(value, int | torch.SymInt) and not isinstance(value, bool)


def plain(size: Any) -> Any:
    """Turn a size into a number that can be compared."""
    if not isinstance(size, torch.Tensor):
        return size
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer warns of decisions, but this decides only what is mended
        return size.item()


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(is_size(v) for v in value)


def is_traced(value: Any) -> bool:
    """Whether a value is a size under ``torch.jit.trace``, where sizes are tensors."""
    tracing = torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
    return tracing and isinstance(value, torch.Tensor) and value.ndim == 0
