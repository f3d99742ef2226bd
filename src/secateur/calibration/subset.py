"""Take a share of the calibration data, spread over all of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from secateur.calibration.batch import Batch
from secateur.calibration.calibration import Calibration

TOGETHER = 16
"""Least number of samples taken from a batch: many small batches cost more than a few larger ones."""


@dataclass(frozen=True, eq=False)
class _Subset:
    """The raw batches of a share of some data; each pass gives the same ones."""

    source: Calibration
    share: float
    whole: bool

    def __iter__(self) -> Iterator[Any]:
        owed = 0.0  # samples still to take to reach the share of what was read so far
        for index, raw in enumerate(self.source.raw_batches()):
            batch = Batch.of(raw, index, self.source.reading)
            least = batch.size if self.whole or batch.whole else min(batch.size, TOGETHER)
            owed = owed + batch.size * self.share if index else max(batch.size * self.share, least)
            taken = min(batch.size, round(owed))
            if taken >= least:
                owed -= taken
                yield raw if taken == batch.size else batch.first(taken).raw


def take_share(data: Calibration, share: float, *, whole: bool = False) -> Calibration:
    """Take about a share of all samples: the first samples of some or all batches.

    Args:
        data: The data to take from.
        share: The fraction of the samples to take, above 0. From 1 on, `data` is returned.
        whole: True: take or skip batches as a whole, starting with the first.

    Returns:
        Calibration data that can be read again and again.
    """
    return data if share >= 1 else replace(data, source=_Subset(data, share, whole), most=None, _start=())
