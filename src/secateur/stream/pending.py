"""Advance all calibration batches together from node to node, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Generic, TypeVar

import torch
from torch import Tensor

from secateur.calibration import Batch, Calibration, map_tensors
from secateur.common.mapped import is_mapped, trim
from secateur.stream.dense import Dense, Show, Values

P = TypeVar("P", bound=Dense)

HELD_BYTES = 1 << 30
"""Most bytes of batch values that stay in memory between two visits. The rest goes to temporary files."""


class PendingBatches(Generic[P]):
    """Holds, for every batch, the values at the position that the sweep has reached.

    Between two visits the values stay in memory up to a limit. The rest goes to temporary files, in the
    folder that `tempfile` chooses (for example ``TMPDIR``), so memory does not grow with the number of
    batches. If the disk is full, that batch is run again from the first node. Use it in a ``with`` block,
    which removes the files.
    """

    def __init__(
        self,
        of: Callable[[Batch], P],
        device: torch.device,
        calibration: Calibration,
        in_files: bool = False,
        takes: Callable[[int], bool] = lambda index: True,
    ) -> None:
        """Start before the first node; nothing runs yet.

        Args:
            of: Returns the programs for the input size of a batch.
            device: Where they run.
            calibration: The batches.
            in_files: Whether the weights lie in files: then memory is short, and an eighth of that stays.
            takes: Position of a batch -> whether it is one of these.
        """
        self._of, self._calibration = of, calibration.to(device)
        self._pair_of: dict[int, P] = {}
        self._in_files = in_files
        self._limit = HELD_BYTES // 8 if in_files else HELD_BYTES
        self._held: dict[int, Values] = {}
        self._sizes: dict[int, int] = {}
        self._folder: TemporaryDirectory[str] | None = None
        self._files: dict[int, _ValuesFile] = {}
        self._indices: list[int] | None = None  # of the batches, once the data were read
        self._takes = takes
        self.repeats = calibration.repeats

    def __enter__(self) -> PendingBatches[P]:
        """Return this object."""
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the temporary files."""
        if self._folder is not None:
            self._folder.cleanup()

    def visit(
        self, place: Callable[[P], int | None], show: Callable[[int], Show] | None = None
    ) -> Iterator[tuple[int, P, Values]]:
        """Advance every batch to a position, and yield its index, its programs and its values there.

        Positions may only grow from one visit to the next.

        Args:
            place: Returns the position for the programs of a batch, or None to skip the batch.
            show: Returns, for the index of a batch, what to call for each node that is computed.
        """
        # If the values of all batches are held, the data need not be read again.
        if self._indices is not None and len(self._held) + len(self._files) == len(self._indices):
            for index in self._indices:
                yield from self._at(place, show, index, None)
            return
        indices = []
        for batch in self._calibration.batches(takes=self._takes):
            if batch.index not in self._pair_of:
                self._pair_of[batch.index] = self._of(batch)
            yield from self._at(place, show, batch.index, batch)
            indices.append(batch.index)
        self._indices = indices

    def bytes(self) -> int:
        """Return the number of bytes that are held in memory."""
        return sum(self._sizes.values())

    def _at(
        self,
        place: Callable[[P], int | None],
        show: Callable[[int], Show] | None,
        index: int,
        batch: Batch | None,
    ) -> Iterator[tuple[int, P, Values]]:
        pair = self._pair_of[index]
        position = place(pair)
        if position is None:
            return
        values, file = self._take(index)
        if values is None or values.position > position:
            if batch is None:
                raise RuntimeError("batches go forward only")
            values = pair.start(batch)
        if file is None or values.position < position:
            pair.advance(values, position, show and show(index))
            file = None  # the values have changed, so the file is out of date
        self._keep(index, values, file)
        yield index, pair, values

    def _take(self, index: int) -> tuple[Values | None, _ValuesFile | None]:
        """Remove a batch from the store; return its values and the file they were in, each None if absent."""
        self._sizes.pop(index, None)
        file = self._files.pop(index, None)
        if file is None:
            return self._held.pop(index, None), None
        return file.read(), file

    def _keep(self, index: int, values: Values, file: _ValuesFile | None) -> None:
        """Store a batch's values in memory or in a file. If `file` is given, it already holds them."""
        size = _bytes(values)
        if self.bytes() + size <= self._limit:
            self._held[index], self._sizes[index] = values, size
            return
        if file is None:
            file = self._write_file(index, values)
        if file is not None:
            self._files[index] = file
        if self._in_files:
            trim()  # else freed values of many batches stay with the process

    def _write_file(self, index: int, values: Values) -> _ValuesFile | None:
        """Write the values to a temporary file. Return None if the disk is full."""
        if self._folder is None:
            self._folder = TemporaryDirectory(prefix="secateur-")
        path = Path(self._folder.name) / f"{index}.bin"
        try:
            return _ValuesFile.write(path, values)
        except OSError:
            path.unlink(missing_ok=True)
            return None


@dataclass(frozen=True)
class _TensorLayout:
    """Which storage a tensor views, and its dtype, size, stride and offset there (in elements)."""

    storage: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


@dataclass(frozen=True, eq=False)
class _ValuesFile:
    """The values of one batch, with the tensors' bytes in a file. Reading runs no code from the file.

    Whole storages are written. Tensors that share a storage must share it again after reading, because a
    program may write to one of them in place.

    Attributes:
        path: The file: all storages, one after the other.
        sizes: The length of each storage. [bytes]
        devices: Where each of them was.
        layouts: The layout of each tensor, in the order of the values; None for views of weights in files.
        template: The values with an empty tensor in place of each tensor that has a layout.
    """

    path: Path
    sizes: tuple[int, ...]
    devices: tuple[torch.device, ...]
    layouts: tuple[_TensorLayout | None, ...]
    template: Values

    @classmethod
    def write(cls, path: Path, values: Values) -> _ValuesFile:
        """Write the values to `path`.

        Raises:
            OSError: If the disk is full.
        """
        storages: dict[tuple[str, int], tuple[int, torch.UntypedStorage]] = {}
        layouts: list[_TensorLayout | None] = []
        nothing = torch.empty(0)

        def put(tensor: Tensor) -> Tensor:
            if is_mapped(tensor):  # a view of a weight, which lies in a file already
                layouts.append(None)
                return tensor
            # A lazy conjugate or negative view is only a flag, which the bytes do not show.
            tensor = tensor.resolve_conj().resolve_neg()
            storage = tensor.untyped_storage()
            place = str(storage.device), storage.data_ptr()
            number, _ = storages.setdefault(place, (len(storages), storage))
            size, stride, offset = tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset())
            layouts.append(_TensorLayout(number, tensor.dtype, size, stride, offset))
            return nothing

        template = _map_values(values, put)
        with path.open("wb") as file:
            for _, storage in storages.values():
                torch.tensor([], dtype=torch.uint8, device=storage.device).set_(storage).cpu().numpy().tofile(
                    file
                )
        written = [storage for _, storage in storages.values()]
        sizes, devices = tuple(s.nbytes() for s in written), tuple(s.device for s in written)
        return cls(path, sizes, devices, tuple(layouts), template)

    def read(self) -> Values:
        """Read the values back into newly allocated memory on their devices."""
        whole = torch.from_file(str(self.path), shared=False, size=sum(self.sizes), dtype=torch.uint8)
        parts = zip(whole.split(list(self.sizes)), self.devices, strict=True)
        storages = [part.to(device, copy=True).untyped_storage() for part, device in parts]
        layouts = iter(self.layouts)

        def get(held: Tensor) -> Tensor:
            layout = next(layouts)
            if layout is None:
                return held
            tensor = torch.empty(0, dtype=layout.dtype, device=self.devices[layout.storage])
            return tensor.set_(storages[layout.storage], layout.offset, layout.size, layout.stride)

        return _map_values(self.template, get)


def _map_values(values: Values, change: Callable[[Tensor], Tensor]) -> Values:
    dense, small = (map_tensors(change, side) for side in (values.dense, values.small))
    return Values(dense, small, values.position, values.padding)


def _bytes(values: Values) -> int:
    storages = [t.untyped_storage() for t in values.tensors() if not is_mapped(t)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
