"""One walk through the program with all calibration batches, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator

from secateur.calibration import Batch, Calibration
from secateur.repair.twin import Twin, Values

HELD_BYTES = 1 << 30
"""Values of batches that are kept while the walk pauses; other batches start from the first node again."""


class Frontier:
    """The values of every batch at the place that the walk has reached.

    A batch's values are kept between two visits while all that are kept fit the limit; those of the
    other batches are computed again from the start. So memory does not grow with the number of batches.
    """

    def __init__(self, twin: Twin, calibration: Calibration, limit: int | None = None) -> None:
        """Begin at the first node.

        Args:
            twin: The programs.
            calibration: The batches.
            limit: Bytes that may be kept; `HELD_BYTES` if not given.
        """
        self._twin, self._calibration = twin, calibration.to(twin.graph.device)
        self._limit = HELD_BYTES if limit is None else limit
        self._held: dict[int, Values] = {}
        self._sizes: dict[int, int] = {}
        self._batches = calibration.count()

    def visit(self, position: int) -> Iterator[tuple[int, Values]]:
        """Each batch's number, and its values just before the node at `position`."""
        if self._batches is not None and len(self._held) == self._batches:
            for index in range(self._batches):
                yield index, self._at(position, index, None)
            return
        count = 0
        for batch in self._calibration.batches():
            yield batch.index, self._at(position, batch.index, batch)
            count += 1
        self._batches = count

    def bytes(self) -> int:
        """What is kept."""
        return sum(self._sizes.values())

    def _at(self, position: int, index: int, batch: Batch | None) -> Values:
        values = self._held.pop(index, None)
        self._sizes.pop(index, None)
        if values is None or values.position > position:
            if batch is None:
                raise RuntimeError("a walk goes forward only")
            values = self._twin.start(batch)
        self._twin.advance(values, position)
        size = _bytes(values)
        if self.bytes() + size <= self._limit:
            self._held[index], self._sizes[index] = values, size
        return values


def _bytes(values: Values) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in values.tensors()}
    return sum(storages.values())
