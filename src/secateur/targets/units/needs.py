"""The sized steps of a call, and what each has to say in the smaller model.

A call consists of steps, most of one; indexing with several slices has a step for each. A step belongs to a
family, which it shares with the operators of the captured program that it becomes.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """One sized step of a call.

    Attributes:
        family: What kind it is: see `secateur.targets.units.calls.FAMILIES`.
        dim: The axis that a ``take`` step reads.
        part: The number of the component of an index that it comes from; 0 for all other calls.
    """

    family: str
    dim: int = 0
    part: int = 0


@dataclass(frozen=True)
class Sizes:
    """Sizes of the result along some axes.

    Attributes:
        axes: For each the number of the axis, what the code says without help, and what it has to say. The
            ratio of the two holds at other sizes too.
    """

    axes: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Parts:
    """Sizes of the parts of a split along an axis."""

    dim: int
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Positions:
    """Positions that are read of an axis: a range, a single one, or a list.

    Attributes:
        start: The first.
        stop: The one behind the last.
        listed: All of them, if they are no range.
        single: Whether it is one, whose axis goes.
        length: How long the axis has to be, where that is how the positions are known.
    """

    start: int
    stop: int
    listed: tuple[int, ...] | None = None
    single: bool = False
    length: int | None = None


@dataclass(frozen=True)
class Number:
    """A count (groups) or numbers (padding, shifts, a layer norm's shape, a range's); None: as it is."""

    value: int | tuple[int | None, ...]


@dataclass(frozen=True)
class Factor:
    """A number that a tensor is multiplied with or divided by; code may compute it from a size.

    Attributes:
        value: What it is in the dense model.
        said: What the smaller model's code says without help. The ratio of the two holds at other sizes too.
    """

    value: float
    said: float = 1.0


@dataclass(frozen=True)
class Heads:
    """The size of an attention's heads, which stays when some go."""

    size: int


Need = Sizes | Parts | Positions | Number | Factor | Heads
"""What a step has to say in the smaller model."""
