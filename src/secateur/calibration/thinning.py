"""A part of the data, from batches all over it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from secateur.calibration.batch import Batch
from secateur.calibration.calibration import Calibration

TOGETHER = 16
"""So many samples of a batch are taken at once: many small batches cost more than a few larger ones."""


@dataclass(frozen=True, eq=False)
class _Thinned:
    source: Calibration
    share: float
    whole: bool

    def __iter__(self) -> Iterator[Any]:
        owed = 0.0
        for index, raw in enumerate(self.source.raw_batches()):
            batch = Batch.of(raw, index, self.source.reading)
            least = batch.size if self.whole or batch.whole else min(batch.size, TOGETHER)
            owed = owed + batch.size * self.share if index else max(batch.size * self.share, least)
            taken = min(batch.size, round(owed))
            if taken >= least:
                owed -= taken
                yield raw if taken == batch.size else batch.first(taken).raw


def thinned(data: Calibration, share: float, *, whole: bool = False) -> Calibration:
    """The first samples of some or all batches, so many that together they are about this share of the data.

    Args:
        data: The data.
        share: Above 0; from 1 on all of it.
        whole: Take whole batches, starting with the first, and leave others out.
    """
    return data if share >= 1 else replace(data, source=_Thinned(data, share, whole), _start=())
