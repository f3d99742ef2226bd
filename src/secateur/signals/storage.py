"""Tensors and a typed header in one safetensors file: written atomically, checked when read, no pickle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import torch
from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError
from safetensors.torch import save_file
from torch import Tensor

from secateur.artefact.writing import replacing, sweep
from secateur.common.paths import require_folder
from secateur.common.reading import complaint, parse_json
from secateur.common.tensorfile import TensorFile, tensor_file
from secateur.errors import ArtefactError

FORMAT = 1
_CONTENT, _CHECKSUM = "secateur", "sha256"


class Header(BaseModel):
    """Base of what a file says beside its tensors. Each kind of file has its own."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    def expected(self, file: TensorFile) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        """The dtype and shape of each tensor that belongs to this header.

        Raises:
            ValueError: No tensors can belong to it.
        """
        raise NotImplementedError


H = TypeVar("H", bound=Header)


class _Content(BaseModel):
    """What all files have."""

    model_config = ConfigDict(strict=True)

    format: int
    kind: str
    secateur: str
    header: dict[str, JsonValue]


def write(path: Path, kind: str, header: Header, tensors: Mapping[str, Tensor]) -> None:
    """Write the file by `secateur.artefact.writing`.

    Args:
        path: The file; its folder must exist.
        kind: What the file holds, such as ``scores``; `read` refuses any other.
        header: What is said beside the tensors.
        tensors: By name, on the CPU.

    Raises:
        ArtefactError: The folder does not exist, or cannot be written to.
    """
    require_folder(path.parent, kind)
    stored = {name: _own(tensor) for name, tensor in tensors.items()}
    content = header.model_dump(mode="json")
    text = json.dumps({"format": FORMAT, "kind": kind, "secateur": version("secateur"), "header": content})
    with replacing(path) as partial:
        save_file(stored, partial, metadata={_CONTENT: text, _CHECKSUM: _digest(text, stored)})


def read(path: Path, kind: str, header: type[H]) -> tuple[H, dict[str, Tensor]]:
    """The header and the tensors of a file that `write` wrote.

    Raises:
        ArtefactError: The file is missing, damaged, of another kind or origin, or newer than this version.
    """
    with tensor_file(path, str(path), ArtefactError, kind) as file:
        text = file.metadata.get(_CONTENT, "")
        found = _content(text)
        if found is None or found.kind != kind:
            got = "a file of another origin" if found is None else found.kind[:40]
            raise ArtefactError(f"{path}: expected {kind} of secateur, got {got}. Name another file.")
        if found.format > FORMAT:
            raise ArtefactError(
                f"{path}: expected format {FORMAT} or older, got {found.format}, written by secateur "
                f"{found.secateur[:40]}. Upgrade secateur."
            )
        content = _checked(path, kind, lambda: header.model_validate_json(json.dumps(found.header)))
        file.require(_checked(path, kind, lambda: content.expected(file)))
        tensors = file.tensors()
    if file.metadata.get(_CHECKSUM) != _digest(text, tensors):
        raise ArtefactError(
            f"{path}: expected the {kind} that were written, got altered ones: the checksum does not fit. "
            "Make the file again."
        )
    return content, tensors


T = TypeVar("T")


def _checked(path: Path, kind: str, make: Callable[[], T]) -> T:
    try:
        return make()
    except ValidationError as error:
        why = complaint(error)
    except ValueError as error:
        why = str(error)
    raise ArtefactError(f"{path}: expected {kind} as secateur writes them, got {why}. Make the file again.")


def _content(text: str) -> _Content | None:
    """What all files have, from JSON; None if the file is not from secateur."""
    try:
        return _Content.model_validate(parse_json(text))
    except ValueError:
        return None


def remove(path: Path) -> None:
    """Delete the file, and what an interrupted `write` left beside it."""
    path.unlink(missing_ok=True)
    sweep(path.parent)


def _own(tensor: Tensor) -> Tensor:
    """The tensor with memory of its own: safetensors refuses what shares or strides."""
    whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor.detach() if whole else tensor.detach().clone(memory_format=torch.contiguous_format)


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(raw_bytes(tensor))
    return digest.hexdigest()


def raw_bytes(tensor: Tensor) -> bytes | memoryview:
    """Return the tensor's bytes, for any type and device."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else b""
