"""Tensors that lie in files: the system reads what is used, and may drop it again when memory is short.

So a model may be larger than the memory. Nothing else has to know: such a tensor is an ordinary one. What is
made from a model of this kind and is as large as it (a pruned copy, a copy in float64) goes to temporary
files too, in the folder that `tempfile` chooses (for example ``TMPDIR``).
"""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from secateur.common.paths import path_named
from secateur.common.reading import complaint, parse_json, read_bytes
from secateur.common.tensorfile import DTYPES, LARGEST_HEADER, tensor_file
from secateur.errors import ArtefactError

INDEX = "model.safetensors.index.json"

SMALL = 1 << 16
"""Tensors with fewer bytes stay in memory: a file for each would cost more than it saves."""


def map_weights(model: nn.Module, folder: str | os.PathLike[str]) -> nn.Module:
    """Give a model the weights in a folder of safetensors files, without reading them into memory.

    The tensors stay in the files. The system reads a page of a file when it is used, and drops it when memory
    is short. So the model may be larger than the memory: `score`, `apply`, `repair` and `verify` process such
    a model part by part, and keep new tensors in temporary files. Changing a tensor does not change the
    files.

    Args:
        model: The model, which is changed in place; usually on the meta device, where it takes no memory.
            Tensors that are in no file, such as tables made by the constructor, must have values: build the
            model inside ``sc.empty_weights()``, which leaves these in memory. Floating tensors get the dtype
            that they have in the files.
        folder: A folder with ``model.safetensors``, or with the shards that
            ``model.safetensors.index.json`` lists; or one safetensors file.

    Returns:
        The model, in evaluation mode.

    Raises:
        ArtefactError: A file is missing or damaged, a tensor has another shape or kind of dtype than the
            model's, or a parameter, or a buffer on the meta device, is in no file.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import save_file
        >>> net = nn.Linear(3, 2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_file(net.state_dict(), f"{folder}/model.safetensors")
        ...     other = map_weights(nn.Linear(3, 2, device="meta"), folder)
        ...     bool((other(torch.ones(1, 3)) == net(torch.ones(1, 3))).all())
        True
    """
    found = {
        name: tensor
        for file in files_of(path_named("map_weights", folder))
        for name, tensor in _mapped(file).items()
    }
    if callable(tie := getattr(model, "tie_weights", None)):
        tie()  # models of Transformers lose their ties when they are built without values
    held = [
        (f"{path}.{leaf}" if path else leaf, tensors, leaf)
        for path, module in model.named_modules(remove_duplicate=False)
        for tensors in (module._parameters, module._buffers)
        for leaf, tensor in tensors.items()
        if tensor is not None
    ]
    made: dict[int, Tensor] = {}  # by the id of the tensor that it replaces: ties stay
    for name, tensors, leaf in held:
        if name in found:
            old, new = tensors[leaf], found[name]
            _check_fits(folder, name, old, new)
            parameter = isinstance(old, nn.Parameter)
            made[id(old)] = nn.Parameter(new, old.requires_grad) if parameter else new.clone()
    for name, tensors, leaf in held:
        tensor = tensors[leaf]
        if (tensor.is_meta or isinstance(tensor, nn.Parameter)) and id(tensor) not in made:
            raise ArtefactError(
                f"{folder}: expected values of {name}, got none. Name the folder with all weights of this "
                "model; for tables that are in no file, build the model inside sc.empty_weights()."
            )
    for _, tensors, leaf in held:
        tensors[leaf] = made.get(id(tensors[leaf]), tensors[leaf])
    return model.eval()


def _check_fits(folder: str | os.PathLike[str], name: str, old: Tensor, new: Tensor) -> None:
    if old.shape != new.shape:
        raise ArtefactError(
            f"{folder}: expected {name} {list(old.shape)}, which the model has, got {list(new.shape)}. "
            "Build the model that the weights were saved from."
        )
    check_kind(str(folder), name, old, new)


def check_kind(where: str, name: str, old: Tensor, new: Tensor) -> None:
    """Check that a tensor from a file may replace a tensor of the model.

    Floats may have another precision of at least two bytes; other dtypes must be equal.

    Raises:
        ArtefactError: The dtypes do not fit.
    """
    floats = [t.is_floating_point() and t.element_size() > 1 for t in (old, new)]
    if old.dtype != new.dtype and not all(floats):
        raise ArtefactError(
            f"{where}: expected {name} of dtype {old.dtype}, which the model has, got {new.dtype}. "
            "Build the model that the weights were saved from."
        )


def is_mapped(tensor: Tensor) -> bool:
    """Whether a tensor's values are in a file."""
    # Subclasses of Tensor may have no storage.
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
    return plain and hasattr(tensor.untyped_storage(), "secateur_in_file")


def any_mapped(tensors: Iterable[Any]) -> bool:
    """Whether one of the values is a tensor in a file."""
    return any(isinstance(value, Tensor) and is_mapped(value) for value in tensors)


def stored_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Store a new tensor in a temporary file if the tensor that it was made from is in a file.

    Args:
        tensor: The new tensor. It must not share memory, nor have a gradient history.
        like: The tensor that it was made from.

    Returns:
        The tensor itself, or one with the same values in a file.
    """
    if not is_mapped(like) or tensor.numel() * tensor.element_size() < SMALL or is_mapped(tensor):
        return tensor
    return empty_file(tensor.numel(), tensor.dtype).view(tensor.shape).copy_(tensor)


def empty_file(size: int, dtype: torch.dtype) -> Tensor:
    """Return a tensor of zeros [size] in a temporary file, which is deleted with the tensor.

    Raises:
        ArtefactError: The disk has too little space.
    """
    handle, path = tempfile.mkstemp(prefix="secateur-")
    try:
        if hasattr(os, "posix_fallocate"):  # a full disk would end the process when the tensor is written
            os.posix_fallocate(handle, 0, size * dtype.itemsize)
        return _from_file(path, size, dtype, shared=True)
    except OSError as error:
        raise ArtefactError(
            f"{Path(path).parent}: expected space for a temporary file of {size * dtype.itemsize} bytes, got "
            f"{error.strerror}. Set TMPDIR to a folder on a larger disk."
        ) from error
    finally:
        os.close(handle)
        if sys.platform != "win32":  # there, a file in use cannot be deleted
            os.unlink(path)  # the space is freed when the tensor is


def copied(tensor: Tensor) -> Tensor:
    """Copy a tensor without its gradient history. If it is in a file, the copy is in a temporary file."""
    return stored_like(tensor.detach().clone(), tensor)


def release(tensors: Iterable[Any]) -> None:
    """Tell the system that the pages of tensors in files are not needed soon. Their values stay.

    Only Linux has a call for this. Other systems decide by themselves.
    """
    if sys.platform != "linux":
        return
    system = ctypes.CDLL(None)
    page = os.sysconf("SC_PAGE_SIZE")
    for tensor in tensors:
        if isinstance(tensor, Tensor) and is_mapped(tensor):
            start = tensor.data_ptr() // page * page
            length = tensor.data_ptr() + tensor.numel() * tensor.element_size() - start
            system.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _PAGEOUT)
    trim()


def trim() -> None:
    """Return freed memory to the system, if the C library has a call for it."""
    system = ctypes.CDLL(None) if sys.platform == "linux" else None
    if system is not None and hasattr(system, "malloc_trim"):
        system.malloc_trim(0)


_PAGEOUT = 21
"""MADV_PAGEOUT of Linux 5.4: changed pages are written to the file, others are dropped."""


def _from_file(path: str | Path, size: int, dtype: torch.dtype, *, shared: bool) -> Tensor:
    """Map a file into memory, and mark the storage, so that `is_mapped` knows all tensors that share it."""
    found = torch.from_file(str(path), shared=shared, size=size, dtype=dtype)
    found.untyped_storage().secateur_in_file = True  # type: ignore[attr-defined]
    return found


def files_of(folder: Path) -> list[Path]:
    """List the safetensors files of a checkpoint.

    Raises:
        ArtefactError: A file is missing.
    """
    if os.path.isfile(folder):
        return [folder]
    if os.path.isfile(folder / INDEX):
        names = sorted(set(_read_index(folder / INDEX).weight_map.values()))
    else:
        names = ["model.safetensors"]
    missing = [name for name in names if Path(name).name != name or not os.path.isfile(folder / name)]
    if missing or not names:
        raise ArtefactError(
            f"{folder}: expected {missing[0] if missing else 'shards'}, got none. Check the folder."
        )
    return [folder / name for name in names]


class _Index(BaseModel):
    """The list of shards that Transformers writes. Other fields are ignored."""

    model_config = ConfigDict(frozen=True, strict=True)

    weight_map: dict[str, str]


def _read_index(file: Path) -> _Index:
    text = read_bytes(file, LARGEST_HEADER, str(file), ArtefactError, "a list of shards")
    try:
        return _Index.model_validate(parse_json(text))
    except ValidationError as error:
        why = complaint(error)
    except (ValueError, RecursionError) as error:
        why = str(error)
    raise ArtefactError(f"{file}: expected a list of shards, got {why}. Check the folder.")


def _mapped(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file as views of the mapped file.

    The format: 8 bytes with the length of the header; the header, JSON with dtype, shape and position of each
    tensor; the bytes of the tensors.
    """
    found = {}
    with tensor_file(path, str(path), ArtefactError) as file:
        size = file.length
        try:
            whole = _from_file(path, size, torch.uint8, shared=False)
        except RuntimeError as error:
            raise ArtefactError(
                f"{path}: expected a safetensors file, got one that cannot be mapped: {error}. Save it again."
            ) from error
        if not file.is_at(path):
            raise ArtefactError(f"{path}: expected an unchanged file, got one that was replaced. Try again.")
        for name, entry in file.entries.items():
            if entry.dtype not in DTYPES:  # tensors of unknown dtypes are ignored
                continue
            dtype = DTYPES[entry.dtype]
            first, last = (file.start + at for at in entry.data_offsets)
            if last - first < SMALL or first % dtype.itemsize:  # a view needs aligned bytes
                found[name] = file.tensor(name)
            else:
                found[name] = whole[first:last].view(dtype).view(entry.shape)
    return found
