"""Counting multiplications without PyTorch's tracking of modules, which needs gradients."""

from __future__ import annotations

from typing import Any

from torch.utils.flop_counter import FlopCounterMode


class _Untracked:
    """Takes the place of a tracker of modules, where all is counted together."""

    parents = frozenset({"Global"})

    def __enter__(self) -> _Untracked:
        return self

    def __exit__(self, *_: Any) -> None:
        pass


def flop_counter() -> FlopCounterMode:
    """Return a counter of all operations that run in it.

    PyTorch's own hooks the gradients of what modules read, which fails for parameters under `torch.no_grad`.

    Example:
        >>> import torch
        >>> with flop_counter() as counter, torch.no_grad():
        ...     _ = torch.nn.Linear(3, 4)(torch.nn.Parameter(torch.ones(2, 3)).expand(2, 3))
        >>> counter.get_total_flops()
        48
    """
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = _Untracked()  # type: ignore[assignment]
    return counter
