"""One walk through the program with all calibration batches, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from secateur.calibration import Batch, Calibration
from secateur.repair.twin import Twin, Twins, Values

HELD_BYTES = 1 << 30
"""Values of batches that are kept in memory while the walk pauses; those of other batches go to files."""


class Frontier:
    """The values of every batch at the place that the walk has reached.

    Between two visits they are kept in memory while they fit the limit, and else in temporary files (in the
    folder that `tempfile` chooses, ``TMPDIR`` say), so that memory does not grow with the number of batches.
    Where there is no room for a file either, that batch starts from the first node again. Use it in ``with``.
    """

    def __init__(self, twins: Twins, calibration: Calibration, limit: int | None = None) -> None:
        """Begin at the first node.

        Args:
            twins: The programs.
            calibration: The batches.
            limit: Bytes that may be kept in memory; `HELD_BYTES` if not given.
        """
        self._twins, self._calibration = twins, calibration.to(twins.first.graph.device)
        self._twin_of: dict[int, Twin] = {}
        self._limit = HELD_BYTES if limit is None else limit
        self._held: dict[int, Values] = {}
        self._sizes: dict[int, int] = {}
        self._folder: TemporaryDirectory[str] | None = None
        self._files: dict[int, Path] = {}
        self._batches = calibration.count()

    def __enter__(self) -> Frontier:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Removes the files."""
        if self._folder is not None:
            self._folder.cleanup()

    def visit(self, place: Callable[[Twin], int | None]) -> Iterator[tuple[int, Twin, Values]]:
        """Each batch's number, its programs, and its values just before the node at a position.

        Args:
            place: The position in the programs; None leaves out the batches that take them.
        """
        if self._batches is not None and len(self._held) + len(self._files) == self._batches:
            for index in range(self._batches):
                yield from self._at(place, index, None)
            return
        count = 0
        for batch in self._calibration.batches():
            if batch.index not in self._twin_of:
                self._twin_of[batch.index] = self._twins.of(batch)
            yield from self._at(place, batch.index, batch)
            count += 1
        self._batches = count

    def bytes(self) -> int:
        """What is kept in memory."""
        return sum(self._sizes.values())

    def _at(
        self, place: Callable[[Twin], int | None], index: int, batch: Batch | None
    ) -> Iterator[tuple[int, Twin, Values]]:
        twin = self._twin_of[index]
        position = place(twin)
        if position is None:
            return
        values, file = self._taken(index)
        if values is None or values.position > position:
            if batch is None:
                raise RuntimeError("a walk goes forward only")
            values = twin.start(batch)
        if file is None or values.position < position:
            twin.advance(values, position)
            file = None
        self._keep(index, values, file)
        yield index, twin, values

    def _taken(self, index: int) -> tuple[Values | None, Path | None]:
        """A batch's values, and the file that they came from."""
        self._sizes.pop(index, None)
        file = self._files.pop(index, None)
        if file is None:
            return self._held.pop(index, None), None
        graph = self._twin_of[index].graph
        found = torch.load(file, map_location=graph.device, weights_only=True)
        nodes = {node.name: node for node in graph.program.graph.nodes}
        dense, small = ({nodes[n]: v for n, v in side.items()} for side in found["values"])
        return Values(dense, small, found["position"]), file

    def _keep(self, index: int, values: Values, file: Path | None) -> None:
        size = _bytes(values)
        if self.bytes() + size <= self._limit:
            self._held[index], self._sizes[index] = values, size
            return
        if file is None:
            file = self._written(index, values)
        if file is not None:
            self._files[index] = file

    def _written(self, index: int, values: Values) -> Path | None:
        """A file of the values; None if there is no room for it."""
        if self._folder is None:
            self._folder = TemporaryDirectory(prefix="secateur-")
        path = Path(self._folder.name) / f"{index}.pt"
        sides = [{node.name: v for node, v in side.items()} for side in (values.dense, values.small)]
        try:
            torch.save({"values": sides, "position": values.position}, path)
        except (OSError, RuntimeError):
            path.unlink(missing_ok=True)
            return None
        return path


def _bytes(values: Values) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in values.tensors()}
    return sum(storages.values())
