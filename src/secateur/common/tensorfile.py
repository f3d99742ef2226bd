"""Read safetensors files of strangers: the header is checked against the file before anything is allocated.

A file is opened once, and all is read from there. So a writer that replaces it meanwhile does no harm.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, BinaryIO

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from torch import Tensor

from secateur.common.reading import Count, complaint, opened, parse_json
from secateur.errors import SecateurError

LARGEST_HEADER = 1 << 26
"""The most bytes of a header."""

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "C64": torch.complex64,
}  # fmt: skip
"""The dtypes of tensors that can be read, by their names in files."""


class Entry(BaseModel):
    """What the header says of one tensor.

    Attributes:
        dtype: A name of `DTYPES`, or one that this version does not know.
        shape: The shape.
        data_offsets: Its first byte, and the one behind its last, counted from the end of the header.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    dtype: Annotated[str, Field(pattern=r"^[A-Z0-9_]{1,16}$")]
    shape: Annotated[list[Count], Field(max_length=32)]
    data_offsets: Annotated[list[Count], Field(min_length=2, max_length=2)]

    @property
    def size(self) -> int:
        """Number of bytes."""
        return self.data_offsets[1] - self.data_offsets[0]


_ENTRIES = TypeAdapter(dict[Annotated[str, Field(max_length=4096)], Entry])
_METADATA = TypeAdapter(dict[str, str], config=ConfigDict(strict=True))


class TensorFile:
    """An open safetensors file whose header fits its length.

    Attributes:
        entries: What the header says, by the tensors' names, in the order of the file.
        metadata: The header's own texts.
        start: The byte where tensors begin.
        length: Number of bytes of the whole file.
    """

    def __init__(self, file: BinaryIO, where: str, error: type[SecateurError]) -> None:
        self._file, self._where, self._error = file, where, error
        self.start, self.metadata, self.entries = 0, dict[str, str](), dict[str, Entry]()
        self.length = os.fstat(file.fileno()).st_size
        try:
            self._read_header(self.length)
        except ValidationError as refused:
            raise self._refused(complaint(refused)) from refused
        except (ValueError, RecursionError) as refused:
            raise self._refused(str(refused)) from refused

    def _refused(self, why: str) -> SecateurError:
        return self._error(
            f"{self._where}: expected a safetensors file, got a damaged one ({why}). Make the file again."
        )

    def _read_header(self, size: int) -> None:
        length = int.from_bytes(self._file.read(8), "little")
        self.start = 8 + length
        if size < 8 or length > min(LARGEST_HEADER, size - 8):
            raise ValueError(f"a header of {length:,} bytes in a file of {size:,}")
        header = parse_json(self._file.read(length))
        if not isinstance(header, dict):
            raise ValueError("a header that is no mapping")
        self.metadata = _METADATA.validate_python(header.pop("__metadata__", {}))
        found = _ENTRIES.validate_python(header)
        self.entries = dict(sorted(found.items(), key=lambda item: item[1].data_offsets))
        end = 0
        for name, entry in self.entries.items():
            known = DTYPES.get(entry.dtype)
            if entry.data_offsets[0] != end or entry.size < 0:
                raise ValueError(f"{name[:80]} does not begin where the tensor before it ends")
            if known is not None and math.prod(entry.shape) * known.itemsize != entry.size:
                raise ValueError(f"{name[:80]} has {entry.size:,} bytes, not those of its shape and dtype")
            end = entry.data_offsets[1]
        if self.start + end != size:
            raise ValueError(f"{size - self.start:,} bytes of tensors in place of {end:,}")

    def require(self, expected: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
        """Check that the file holds exactly these tensors, given as dtype and shape by name.

        Raises:
            SecateurError: It holds others.
        """
        found = {name: (entry.dtype, tuple(entry.shape)) for name, entry in self.entries.items()}
        wrong = sorted(n for n in {*found, *expected} if found.get(n) != expected.get(n))
        if wrong:
            want, got = (each.get(wrong[0], "none") for each in (expected, found))
            raise self._error(
                f"{self._where}: expected {want} of tensor {wrong[0][:80]!r}, got {got}. Make the file again."
            )

    def tensor(self, name: str) -> Tensor:
        """Read one tensor into memory of its own.

        Raises:
            SecateurError: This version does not know its dtype, it does not fit into memory, or the file has
                become shorter.
        """
        entry = self.entries[name]
        if entry.dtype not in DTYPES:
            raise self._refused(f"{name[:80]} of dtype {entry.dtype}, which is not known")
        try:
            found = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        except RuntimeError as refused:  # so torch calls a lack of memory
            raise self._error(
                f"{self._where}: expected tensors that fit into memory, got {name[:80]!r} of {entry.size:,} "
                "bytes. Check where the file comes from, or use a machine with more memory."
            ) from refused
        if entry.size:
            self._file.seek(self.start + entry.data_offsets[0])
            whole: Any = found.reshape(-1).view(torch.uint8).numpy().data
            done = 0
            while done < entry.size and (read := self._file.readinto(whole[done:])):  # type: ignore[attr-defined]
                done += read
            if done != entry.size:
                raise self._refused("it became shorter while it was read")
        return found

    def is_at(self, path: str | os.PathLike[str]) -> bool:
        """Whether this file is the one that is found at a path."""
        return os.path.samestat(os.fstat(self._file.fileno()), os.stat(path))

    def tensors(self) -> dict[str, Tensor]:
        """Read all tensors."""
        return {name: self.tensor(name) for name in self.entries}


def checksum(file: BinaryIO) -> str:
    """The SHA-256 of a whole open file, which is then at its beginning again."""
    digest = hashlib.sha256()
    file.seek(0)
    while block := file.read(1 << 20):
        digest.update(block)
    file.seek(0)
    return digest.hexdigest()


@contextmanager
def tensor_file(
    path: str | os.PathLike[str], where: str, error: type[SecateurError], what: str = "a safetensors file"
) -> Iterator[TensorFile]:
    """Open a safetensors file; see `secateur.common.reading.opened`.

    Raises:
        SecateurError: It is missing, or its header does not fit it.
    """
    with opened(path, where, error, what) as file:
        yield TensorFile(file, where, error)
