"""Amounts of work: how much of each kind, and how many bytes are held; plain data that adds up."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

KINDS = (
    "matmul float32",
    "matmul bfloat16",
    "matmul float64",
    "convolution float32",
    "convolution float64",
    "factor float64",
    "bytes",
    "filed",
    "sorted",
    "differences",
    "calls",
    "nodes",
)
"""What work is measured in. ``matmul``, ``convolution``: multiply-adds of that type. ``factor``: those of
Cholesky factors, inverses and triangular solves. ``bytes``: read or written. ``filed``: bytes written to
files or read from them. ``sorted``: numbers that are sorted, in rows of some dozens. ``differences``: numbers
in sums of absolute differences. ``calls``: operators that Python calls. ``nodes``: of the program that
`torch.export` captures and the rules of `graph/` walk."""


@dataclass(frozen=True)
class Work:
    """What something takes.

    Attributes:
        amounts: By kind.
        peak: Most bytes that it holds at a time, beyond what was there before.
    """

    amounts: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    peak: int = 0

    def __post_init__(self) -> None:
        """Refuse a kind that no rate will be known for."""
        unknown = set(self.amounts) - set(KINDS)
        if unknown:
            raise ValueError(f"work: expected kinds among {', '.join(KINDS)}, got {sorted(unknown)}.")

    def __add__(self, other: Work) -> Work:
        """One after the other: amounts add up, the larger peak counts."""
        kinds = self.amounts.keys() | other.amounts.keys()
        amounts = {k: self.amounts.get(k, 0) + other.amounts.get(k, 0) for k in kinds}
        return Work(amounts, max(self.peak, other.peak))

    def __mul__(self, times: float) -> Work:
        """So many times one after the other."""
        return Work({k: v * times for k, v in self.amounts.items()}, self.peak)

    def beside(self, held: int) -> Work:
        """The same while so many further bytes are held."""
        return Work(self.amounts, self.peak + held)

    @property
    def products(self) -> float:
        """Multiply-adds of all types."""
        return sum(v for k, v in self.amounts.items() if k.split()[0] in ("matmul", "convolution", "factor"))

    def seconds(self, rates: Mapping[str, float]) -> float:
        """At these rates, an amount of each kind a second."""
        return sum(v / rates[k] for k, v in self.amounts.items())

    def dominant(self, rates: Mapping[str, float]) -> str:
        """The kind that takes the most of these seconds."""
        return max(self.amounts, key=lambda kind: self.amounts[kind] / rates[kind])


def total(works: Iterable[Work]) -> Work:
    """One after the other."""
    return sum(works, Work())
