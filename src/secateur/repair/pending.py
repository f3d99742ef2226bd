"""All calibration batches run through the programs up to one node after another, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from secateur.calibration import Batch, Calibration, map_tensors
from secateur.repair.pairs import Pair, Pairs, Values

HELD_BYTES = 1 << 30
"""Values of batches that are kept in memory between two visits; those of other batches go to files."""


class PendingBatches:
    """The values of every batch at the node that has been reached.

    Between two visits they are kept in memory while they fit the limit, and else in temporary files (in the
    folder that `tempfile` chooses, ``TMPDIR`` say), so that memory does not grow with the number of batches.
    Where there is no room for a file either, that batch starts from the first node again. Use it in ``with``.
    """

    def __init__(self, pairs: Pairs, calibration: Calibration, limit: int | None = None) -> None:
        """Begin at the first node.

        Args:
            pairs: The programs.
            calibration: The batches.
            limit: Bytes that may be kept in memory; `HELD_BYTES` if not given.
        """
        self._pairs, self._calibration = pairs, calibration.to(pairs.first.graph.device)
        self._pair_of: dict[int, Pair] = {}
        self._limit = HELD_BYTES if limit is None else limit
        self._held: dict[int, Values] = {}
        self._sizes: dict[int, int] = {}
        self._folder: TemporaryDirectory[str] | None = None
        self._files: dict[int, _File] = {}
        self._batches = calibration.count()

    def __enter__(self) -> PendingBatches:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Removes the files."""
        if self._folder is not None:
            self._folder.cleanup()

    def visit(self, place: Callable[[Pair], int | None]) -> Iterator[tuple[int, Pair, Values]]:
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
            if batch.index not in self._pair_of:
                self._pair_of[batch.index] = self._pairs.of(batch)
            yield from self._at(place, batch.index, batch)
            count += 1
        self._batches = count

    def bytes(self) -> int:
        """What is kept in memory."""
        return sum(self._sizes.values())

    def _at(
        self, place: Callable[[Pair], int | None], index: int, batch: Batch | None
    ) -> Iterator[tuple[int, Pair, Values]]:
        pair = self._pair_of[index]
        position = place(pair)
        if position is None:
            return
        values, file = self._taken(index)
        if values is None or values.position > position:
            if batch is None:
                raise RuntimeError("batches go forward only")
            values = pair.start(batch)
        if file is None or values.position < position:
            pair.advance(values, position)
            file = None
        self._keep(index, values, file)
        yield index, pair, values

    def _taken(self, index: int) -> tuple[Values | None, _File | None]:
        """A batch's values, and the file that they came from."""
        self._sizes.pop(index, None)
        file = self._files.pop(index, None)
        if file is None:
            return self._held.pop(index, None), None
        return file.read(self._pair_of[index].graph.device), file

    def _keep(self, index: int, values: Values, file: _File | None) -> None:
        size = _bytes(values)
        if self.bytes() + size <= self._limit:
            self._held[index], self._sizes[index] = values, size
            return
        if file is None:
            file = self._written(index, values)
        if file is not None:
            self._files[index] = file

    def _written(self, index: int, values: Values) -> _File | None:
        """A file of the values; None if there is no room for it."""
        if self._folder is None:
            self._folder = TemporaryDirectory(prefix="secateur-")
        path = Path(self._folder.name) / f"{index}.bin"
        try:
            return _File.write(path, values)
        except OSError:
            path.unlink(missing_ok=True)
            return None


@dataclass(frozen=True)
class _Place:
    """Where a tensor is: in which storage, and how it lies there."""

    storage: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


@dataclass(frozen=True, eq=False)
class _File:
    """Values whose bytes are in a file: read from a memory map, so nothing in the file is run as code.

    Whole storages are written, because tensors that share one have to share it again: a program may write
    to one of them in place.

    Attributes:
        path: The storages, one after the other.
        sizes: Their lengths. [bytes]
        places: For each tensor of the values, in order, where it is.
        shell: The values with nothing in the place of their tensors.
    """

    path: Path
    sizes: tuple[int, ...]
    places: tuple[_Place, ...]
    shell: Values

    @classmethod
    def write(cls, path: Path, values: Values) -> _File:
        """Write the values.

        Raises:
            OSError: There is no room.
        """
        storages: dict[int, tuple[int, torch.UntypedStorage]] = {}
        places: list[_Place] = []
        nothing = torch.empty(0)

        def put(tensor: Tensor) -> Tensor:
            tensor = tensor.resolve_conj().resolve_neg()  # such views are a flag, which bytes do not hold
            storage = tensor.untyped_storage()
            number, _ = storages.setdefault(storage.data_ptr(), (len(storages), storage))
            size, stride, offset = tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset())
            places.append(_Place(number, tensor.dtype, size, stride, offset))
            return nothing

        shell = _changed(values, put)
        with path.open("wb") as file:
            for _, storage in storages.values():
                torch.tensor([], dtype=torch.uint8, device=storage.device).set_(storage).cpu().numpy().tofile(
                    file
                )
        return cls(path, tuple(s.nbytes() for _, s in storages.values()), tuple(places), shell)

    def read(self, device: torch.device) -> Values:
        """The values, in memory of their own on a device."""
        whole = torch.from_file(str(self.path), shared=False, size=sum(self.sizes), dtype=torch.uint8)
        storages = [part.to(device, copy=True).untyped_storage() for part in whole.split(list(self.sizes))]
        places = iter(self.places)

        def get(_: Tensor) -> Tensor:
            place = next(places)
            tensor = torch.empty(0, dtype=place.dtype, device=device)
            return tensor.set_(storages[place.storage], place.offset, place.size, place.stride)

        return _changed(self.shell, get)


def _changed(values: Values, change: Callable[[Tensor], Tensor]) -> Values:
    dense, small = (map_tensors(change, side) for side in (values.dense, values.small))
    return Values(dense, small, values.position)


def _bytes(values: Values) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in values.tensors()}
    return sum(storages.values())
