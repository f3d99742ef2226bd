"""Data that can be read only once, or that never end."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader

from secateur.errors import CalibrationError

MOST = 50_000
"""Most batches in a pass over data of unknown length, because some never end."""

_ADVICE = "Pass Calibration.of(data, samples=4096), for instance, or data that end."


def once(data: Iterable[Any]) -> Iterator[Any] | None:
    """Return the iterator of data that can be read only once, such as a generator; None for other data."""
    if isinstance(data, Iterator):
        return data
    if isinstance(data, DataLoader | list | tuple):
        return None
    first = iter(data)
    return first if first is iter(data) else None


def read_once(iterator: Iterator[Any]) -> list[Any]:
    """Read all batches into memory.

    Raises:
        CalibrationError: There are none, or they need more than half of the free memory.
    """
    limit = _free_memory() // 2
    found, held = [], 0
    for raw in iterator:
        found.append(raw)
        held += sum(v.nbytes for v in pytree.tree_leaves(raw) if isinstance(v, Tensor))
        if len(found) > MOST or held > limit:
            raise CalibrationError(
                f"calibration: expected an iterator whose batches fit into memory, got more than "
                f"{len(found) - 1:,} of them ({held / 1e9:.1f} GB). An iterator gives its data once, so they "
                f"are kept. {_ADVICE}"
            )
    if not found:
        raise CalibrationError(
            f"calibration: expected batches, got a {type(iterator).__name__} that has none left. An iterator "
            "gives its data once. Pass a list of batches or a DataLoader, which can be read again."
        )
    return found


def check_ends(read: int) -> None:
    """Raise CalibrationError if so many batches were read that the data may never end."""
    if read > MOST:
        raise CalibrationError(
            f"calibration: expected data that end, got more than {MOST:,} batches from a source of unknown "
            f"length. {_ADVICE}"
        )


def _free_memory() -> int:
    """Return the free memory in bytes; a guess if the system does not tell."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return 1 << 34


def check_same(count: int, before: int) -> None:
    """Check that two passes over the data give equally many values, which are then compared in pairs.

    Raises:
        CalibrationError: They do not.
    """
    if count != before:
        raise CalibrationError(
            f"calibration: expected the same samples in every pass, got {count} values after {before} in the "
            "pass before. Pass data that do not change, such as a list of batches."
        )
