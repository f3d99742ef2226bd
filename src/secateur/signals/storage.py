"""Tensors and a JSON header in one safetensors file: written atomically, checked when read, no pickle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from secateur.artefact.writing import remove_partial, replacing
from secateur.errors import ArtefactError

FORMAT = 1
_CONTENT, _CHECKSUM = "secateur", "sha256"


def write(path: Path, kind: str, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write the file by `secateur.artefact.writing`.

    Args:
        path: The file; its folder must exist.
        kind: What the file holds, such as ``scores``; `read` refuses any other.
        header: What JSON can hold.
        tensors: By name, on the CPU.

    Raises:
        ArtefactError: The folder does not exist.
    """
    if not path.parent.is_dir():
        raise ArtefactError(f"{kind}: expected a folder {path.parent}, got none. Make it.")
    stored = {name: _own(tensor) for name, tensor in tensors.items()}
    content = {"format": FORMAT, "kind": kind, "secateur": version("secateur"), "header": dict(header)}
    text = json.dumps(content)
    with replacing(path) as partial:
        save_file(stored, partial, metadata={_CONTENT: text, _CHECKSUM: _digest(text, stored)})


def read(path: Path, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header and the tensors of a file that `write` wrote.

    Raises:
        ArtefactError: The file is missing, damaged, of another kind or origin, or newer than this version.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # Copies: what was read is mapped from the file, which may be replaced.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
    except SafetensorError as error:
        raise ArtefactError(f"{path}: expected a safetensors file, got a damaged one ({error}).") from error
    except OSError as error:
        raise ArtefactError(f"{path}: expected {kind}, got no file that can be read ({error}).") from error
    text = metadata.get(_CONTENT, "")
    found = _Content.of(text)
    if found is None or found.kind != kind:
        got = "a file of another origin" if found is None else found.kind
        raise ArtefactError(f"{path}: expected {kind} of secateur, got {got}. Name another file.")
    if found.format > FORMAT:
        raise ArtefactError(
            f"{path}: expected format {FORMAT} or older, got {found.format}, written by secateur "
            f"{found.secateur}. Upgrade secateur."
        )
    if metadata.get(_CHECKSUM) != _digest(text, tensors):
        raise ArtefactError(
            f"{path}: expected the {kind} that were written, got altered ones: the checksum does not fit. "
            "Make the file again."
        )
    return found.header, tensors


class _Content(BaseModel):
    """The header that all files have."""

    format: int
    kind: str
    secateur: str
    header: dict[str, Any]

    @classmethod
    def of(cls, text: str) -> _Content | None:
        """Read it from JSON; None if the file is not from secateur."""
        try:
            return cls.model_validate_json(text)
        except ValidationError:
            return None


def remove(path: Path) -> None:
    """Delete the file, and what an interrupted `write` left of it."""
    path.unlink(missing_ok=True)
    remove_partial(path)


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
