"""The steps of a call, and what each needs to pass in the smaller model.

Most calls with sizes are one step. Indexing with several slices is one step for each slice. Steps are sorted
into families; the operators of the captured program that a step becomes belong to the same family.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """One step of a call, which passes sizes, positions or a number.

    Attributes:
        family: The kind of step: see `secateur.targets.units.module_form.calls.FAMILIES`.
        dim: The axis that a ``take`` step reads.
        part: The number of its component in an index; 0 for all other calls.
    """

    family: str
    dim: int = 0
    part: int = 0


@dataclass(frozen=True)
class Sizes:
    """The sizes of the result along some axes.

    Attributes:
        axes: For each, the number of the axis, the size that the code passes, and the size that it needs to
            pass. At other input sizes, the ratio of the two is the same.
    """

    axes: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Parts:
    """The sizes of the parts of a split along an axis."""

    dim: int
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Positions:
    """The positions that are read along an axis: a range, a single position, or a list.

    Attributes:
        start: The first position.
        stop: One more than the last position.
        listed: All positions, if they are not a range.
        single: Whether it is a single position, whose axis vanishes.
        length: The length of the axis for which the positions are known; None if they hold for any.
    """

    start: int
    stop: int
    listed: tuple[int, ...] | None = None
    single: bool = False
    length: int | None = None


@dataclass(frozen=True)
class Number:
    """One or several other numbers: groups, padding, shifts, the shape of a layer norm, the ends of a range.

    None in place of a number leaves it as it is.
    """

    value: int | tuple[int | None, ...]


@dataclass(frozen=True)
class Factor:
    """A number that a tensor is multiplied or divided by. Code may compute it from a size.

    Attributes:
        value: The number in the dense model.
        passed: The number that the smaller model's code passes. At other input sizes, the ratio of the two is
            the same.
    """

    value: float
    passed: float = 1.0


@dataclass(frozen=True)
class Heads:
    """The size of the heads of an attention. It stays the same when heads are removed."""

    size: int


Need = Sizes | Parts | Positions | Number | Factor | Heads
"""What a step needs to pass in the smaller model."""
