"""Read calibration data from a ``.npz`` file."""

from __future__ import annotations

import io
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.common.reading import opened
from secateur.errors import CalibrationError, SettingError

if TYPE_CHECKING:
    import numpy as np
    import torch

LARGEST_PACKED, MOST_PACKED = 1 << 27, 20
"""Arrays may have this many bytes, and so many for each byte of the file, which could hold any size."""

MEMBERS = 256
"""The most arrays of a file."""

_DAMAGE = (OSError, ValueError, EOFError, RuntimeError, LookupError, TypeError, OverflowError, struct.error)

INPUT_NAMES, LABEL_NAMES = ("x", "inputs", "images"), ("y", "labels")


def arrays(
    option: str, path: Path, batch_size: int, seed: int, samples: int | None = None
) -> list[tuple[torch.Tensor, ...]]:
    """Read batches from a ``.npz`` file, shuffled with `seed`, because files are often sorted by class.

    Raises:
        SettingError: If the batch size is none.
        CalibrationError: If the file is missing or does not hold what it should.
    """
    import numpy as np
    import torch

    where = f"{option} {path}"
    if batch_size < 1:
        raise SettingError(f"--batch-size {batch_size}: expected at least 1. Give 64, for example.")
    if not os.path.isfile(path):
        raise CalibrationError(f"{where}: expected a file, got none there. Check the path.")
    with opened(path, where, CalibrationError, "arrays as numpy.savez writes them") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                held = {each.name: each for each in map(partial(_header, archive), _members(archive))}
                found = _chosen(where, held, os.fstat(file.fileno()).st_size)
                arrays = [each.read(archive) for each in found]
        except CalibrationError:
            raise
        except (*_DAMAGE, zipfile.BadZipFile, zlib.error) as error:
            raise CalibrationError(
                f"{where}: expected arrays as numpy.savez writes them, got a file that cannot be read "
                f"({error}). Save it again, without objects."
            ) from error
    order = np.random.default_rng(seed).permutation(len(arrays[0]))[:samples]
    kinds = {"f": torch.get_default_dtype(), "i": torch.int64, "u": torch.int64, "b": torch.bool}
    tensors = [torch.from_numpy(array[order]).to(kinds[array.dtype.kind]) for array in arrays]
    return list(zip(*(tensor.split(batch_size) for tensor in tensors), strict=True))


@dataclass(frozen=True)
class _Array:
    """One array of an archive, as its header describes it."""

    name: str
    info: zipfile.ZipInfo
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool
    start: int

    def __str__(self) -> str:
        return f"{self.name[:40]} {list(self.shape)} {self.dtype}"

    @property
    def size(self) -> int:
        """Number of bytes that shape and dtype ask for."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, archive: zipfile.ZipFile) -> np.ndarray[Any, Any]:
        """The array. Its size was checked."""
        import numpy as np

        with archive.open(self.info) as file:
            file.read(self.start)
            found = np.frombuffer(bytearray(file.read(self.size)), self.dtype)
        if found.nbytes != self.size:
            raise ValueError(f"{self.name[:40]} is cut short")
        return found.reshape(self.shape, order="F" if self.fortran else "C")


def _members(archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    found = archive.infolist()
    if len(found) > MEMBERS:
        raise ValueError(f"more than {MEMBERS} arrays")
    if odd := [
        each for each in found if each.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
    ]:
        raise ValueError(f"a compression of type {odd[0].compress_type}")
    return found


def _header(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> _Array:
    """Read what an array is, and not the array."""
    from numpy.lib import format as npy

    with archive.open(info) as member:
        file = io.BytesIO(member.read(1 << 16))
        version = npy.read_magic(file)
        read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
        if version not in read:
            raise ValueError(f"a format of version {version}")
        shape, fortran, dtype = read[version](file)
        return _Array(info.filename.removesuffix(".npy"), info, shape, dtype, fortran, file.tell())


def _chosen(where: str, held: Mapping[str, _Array], length: int) -> list[_Array]:
    """The inputs, and the labels if there are any, once all about them is as it should be."""
    shapes = ", ".join(map(str, list(held.values())[:8])) or "no array"
    inputs = next((held[name] for name in INPUT_NAMES if name in held), None)
    labels = next((held[name] for name in LABEL_NAMES if name in held), None)
    if inputs is None:
        raise CalibrationError(
            f"{where}: expected an array named x, inputs or images, and labels named y or labels, "
            f"got {shapes}. Write them with numpy.savez(path, x=..., y=...)."
        )
    if not inputs.shape or min(inputs.shape) == 0:
        raise CalibrationError(f"{where}: expected samples along axis 0, got {shapes}. Save at least two.")
    if inputs.dtype == "uint8":
        raise CalibrationError(
            f"{where}: expected inputs as the model takes them, got raw bytes ({shapes}). "
            "Normalise them as in training and save them as float32."
        )
    if inputs.dtype.kind not in "fiub":
        raise CalibrationError(f"{where}: expected inputs that are numbers, got {shapes}. Save float32.")
    if labels is not None and labels.shape[:1] != inputs.shape[:1]:
        raise CalibrationError(
            f"{where}: expected a label for each input, got {shapes}. Save arrays of one length."
        )
    if labels is not None and labels.dtype.kind not in "fiub":
        raise CalibrationError(f"{where}: expected labels that are numbers, got {shapes}. Save integers.")
    found = [inputs] if labels is None else [inputs, labels]
    for each in found:
        if each.start + each.size != each.info.file_size:
            raise ValueError(f"{each} in {each.info.file_size:,} bytes")
    if sum(each.size for each in found) > LARGEST_PACKED + MOST_PACKED * length:
        raise ValueError(f"{shapes} packed into {length:,} bytes")
    return found
