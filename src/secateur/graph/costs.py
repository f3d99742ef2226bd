"""Parameters and MACs as a function of which units are kept."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from secateur.measure.cost import Cost

_BLOCK = 512
"""Stages of a sweep that are evaluated together."""


class Term(NamedTuple):
    """A factor times the sizes of some axes.

    Attributes:
        factor: The factor.
        axes: Numbers of axes of the cost model.
        origin: For parameters the name of the tensor, for MACs the node of the program; empty for neither.
    """

    factor: int
    axes: tuple[int, ...]
    origin: str = ""


class CostModel:
    """Parameters and MACs as sums of products of axis sizes.

    Units are numbered through all groups; such a number is a *slot*. The size of an axis is a constant plus
    the number of its positions whose slot is kept. A term is a factor times the sizes of some axes: a linear
    layer, for example, costs samples x inputs x outputs. So the cost of any plan takes a few vector
    operations, and the cost of a unit depends on what every other group keeps.

    Args:
        slots: How many units there are.
        batch: The number of samples that the terms were counted for.
    """

    def __init__(self, slots: int, batch: int) -> None:
        self.slots = slots
        self.batch = batch
        self._fixed: list[int] = [1]
        self._members: list[NDArray[np.int64]] = [np.zeros(0, np.int64)]
        self._numbers: dict[bytes, int] = {}  # of the axes so far, by their slots
        self._terms: dict[str, list[Term]] = {"params": [], "macs": []}
        self._ready: _Arrays | None = None

    def axis(self, slots: NDArray[np.int64]) -> int:
        """Add an axis by the slot of each position, -1 if it always stays. Return the number of the axis."""
        key = slots.tobytes()
        if key not in self._numbers:
            self._numbers[key] = len(self._fixed)
            self._fixed.append(int((slots < 0).sum()))
            self._members.append(slots[slots >= 0])
        return self._numbers[key]

    def add(self, kind: str, factor: int, axes: Iterable[int], origin: str = "") -> None:
        """Add a term to ``params``, or to ``macs`` of the whole batch."""
        self._terms[kind].append(Term(factor, tuple(axes), origin))
        self._ready = None

    def terms(self, kind: str) -> list[Term]:
        """Return the terms of ``params`` or ``macs``."""
        return list(self._terms[kind])

    def with_terms(self, terms: dict[str, list[Term]], more: int = 0) -> CostModel:
        """Return a model with the same axes and other terms, and `more` further slots at the end."""
        other = CostModel(self.slots + more, self.batch)
        other._fixed, other._members, other._numbers = [*self._fixed], [*self._members], dict(self._numbers)
        other._terms = terms
        return other

    def given(self, keep: NDArray[np.bool_]) -> CostModel:
        """Return a model of the first slots alone, for a given choice of the last ones.

        Args:
            keep: True for each of the last slots that stays. [last slots]
        """
        other = CostModel(self.slots - len(keep), self.batch)
        other._members = [slots[slots < other.slots] for slots in self._members]
        last = (slots[slots >= other.slots] - other.slots for slots in self._members)
        other._fixed = [
            fixed + int(keep[slots].sum()) for fixed, slots in zip(self._fixed, last, strict=True)
        ]
        other._terms = self._terms
        return other

    def cost(self, keep: NDArray[np.bool_]) -> Cost:
        """Compute the cost of one sample. `keep` is True for each unit that stays. [slots]"""
        params, macs = self._arrays().evaluate(keep)
        return Cost(params=params, macs=macs // self.batch)

    def sweep(self, gone: NDArray[np.int64], stages: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Compute parameters, and MACs of one sample, at every stage of a removal. [stages] each

        Args:
            gone: The first stage without each unit; a unit with `stages` or more is never removed. [slots]
            stages: Number of stages.
        """
        params, macs = self._arrays().sweep(gone, stages)
        return params, macs // self.batch

    def _arrays(self) -> _Arrays:
        if self._ready is None:
            self._ready = _Arrays(self._fixed, self._members, self._terms)
        return self._ready


class _Arrays:
    """The terms as arrays, so that NumPy evaluates all of them at once."""

    def __init__(
        self,
        fixed: Sequence[int],
        members: Sequence[NDArray[np.int64]],
        terms: dict[str, list[Term]],
    ) -> None:
        self.fixed = np.asarray(fixed, dtype=np.int64)
        self.live = np.array([i for i, m in enumerate(members) if len(m)], dtype=np.int64)
        sizes = [len(members[i]) for i in self.live]
        self.starts = np.cumsum([0, *sizes[:-1]]) if sizes else np.zeros(0, np.int64)
        self.slots = np.concatenate([members[i] for i in self.live]) if sizes else np.zeros(0, np.int64)
        self.kinds = []
        for kind in ("params", "macs"):
            rank = max((len(term.axes) for term in terms[kind]), default=1)
            index = np.zeros((len(terms[kind]), rank), dtype=np.int64)  # axis 0 is the constant 1
            for row, term in enumerate(terms[kind]):
                index[row, : len(term.axes)] = term.axes
            factor = np.array([term.factor for term in terms[kind]], dtype=np.int64)
            self.kinds.append((factor, index))

    def evaluate(self, keep: NDArray[np.bool_]) -> tuple[int, int]:
        sizes = self.fixed.copy()
        if len(self.live):
            sizes[self.live] += np.add.reduceat(keep[self.slots].astype(np.int64), self.starts)
        params, macs = (int((factor * sizes[index].prod(axis=1)).sum()) for factor, index in self.kinds)
        return params, macs

    def sweep(self, gone: NDArray[np.int64], stages: int) -> list[NDArray[np.int64]]:
        """Compute both totals at every stage. Working in blocks of stages keeps the memory small."""
        totals = [np.zeros(stages, dtype=np.int64) for _ in self.kinds]
        lengths = np.diff(np.append(self.starts, len(self.slots)))
        axis = np.repeat(self.live, lengths)
        whole = self.fixed.copy()
        whole[self.live] += lengths
        for start in range(0, stages, _BLOCK):
            stop = min(start + _BLOCK, stages)
            width = stop - start + 1  # the last column counts what is removed later or never
            when = np.clip(gone[self.slots], start, stop) - start
            counts = np.bincount(axis * width + when, minlength=len(whole) * width).reshape(-1, width)
            sizes = whole[:, None] - np.cumsum(counts[:, :-1], axis=1)  # [axes, block]
            for total, (factor, index) in zip(totals, self.kinds, strict=True):
                product = np.repeat(factor[:, None], stop - start, axis=1)
                for column in index.T:
                    product *= sizes[column]
                total[start:stop] = product.sum(axis=0)
        return totals
