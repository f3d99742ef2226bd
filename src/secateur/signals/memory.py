"""Split a run into passes, so that what the tallies hold stays below a limit."""

from __future__ import annotations

import re
from collections.abc import Sequence

from secateur.errors import SettingError
from secateur.graph.graph import Graph
from secateur.graph.groups import Group
from secateur.signals.signal import Signal

Covers = dict[str, tuple[Group, ...]]
"""The groups that each signal scores in one pass over the data, by the signal's name."""

_UNITS = (
    {"": 1}
    | {
        f"{prefix}{suffix}": base**power
        for power, prefix in enumerate("kmgt", start=1)
        for suffix, base in (("b", 1000), ("ib", 1024))
    }
    | {"b": 1}
)


def in_bytes(memory: int | str) -> int:
    """Convert a limit such as ``2 GB`` to bytes.

    Raises:
        SettingError: It is no positive number with a known unit.

    Example:
        >>> in_bytes("2 GB"), in_bytes("0.5 GiB"), in_bytes(4096)
        (2000000000, 536870912, 4096)
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(memory).lower())
    if found is None or found[2] not in _UNITS or float(found[1]) <= 0:
        raise SettingError(
            f"memory: expected a number of bytes or a size such as '2 GB' or '512 MiB', got {memory!r}. "
            "Give one, or None for no limit."
        )
    return int(float(found[1]) * _UNITS[found[2]])


def is_heavy(signal: Signal, graph: Graph) -> bool:
    """Return whether the signal holds more than a few numbers for each unit."""
    return any(signal.held(graph, 2).values())


def passes(graph: Graph, signals: Sequence[Signal], limit: int | None, classes: int) -> list[Covers]:
    """Which groups each signal scores in which pass, so that no pass holds more than `limit` bytes.

    Signals that hold little score every group in the first pass. For the others, groups are taken in order
    as long as they fit, so later passes do only what these signals need.

    Args:
        graph: The traced model.
        signals: All of the run.
        limit: In bytes; None: one pass.
        classes: How many classes the data have.

    Raises:
        SettingError: A single group does not fit.
    """
    everything = {signal.name: graph.groups for signal in signals}
    heavy = [signal for signal in signals if is_heavy(signal, graph)]
    if limit is None or not heavy:
        return [everything]
    by_signal = [signal.held(graph, classes) for signal in heavy]
    chunks: list[list[Group]] = [[]]
    taken = 0
    for group in graph.groups:
        held = sum(by_group.get(group.name, 0) for by_group in by_signal)
        if held > limit:
            names = ", ".join(signal.name for signal in heavy)
            raise SettingError(
                f"memory: expected at least {held} bytes, which {names} may hold for group {group.name}, got "
                f"{limit}. Raise the limit, or choose settings or signals that hold less."
            )
        if taken + held > limit:
            chunks.append([])
            taken = 0
        chunks[-1].append(group)
        taken += held
    later = [{signal.name: tuple(chunk) for signal in heavy} for chunk in chunks]
    return [everything | later[0], *later[1:]]
