"""CIFAR-10 images for the benchmarks, read from the data folder where there is one.

The folder is `$SECATEUR_DATA`, or `shared/data` beside the checkout. It is no part of the project: a
benchmark that needs it says so and ends without failing where it is absent.
"""

from __future__ import annotations

import io
import os
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
"""What the benchmarks' networks expect, for RGB in [0, 1]."""

Split = Literal["train", "test"]


def data_directory() -> Path | None:
    """The data folder, or None where there is none.

    Raises:
        FileNotFoundError: If `SECATEUR_DATA` is set, but names no folder.
    """
    named = os.environ.get("SECATEUR_DATA")
    if named:
        if not Path(named).is_dir():
            raise FileNotFoundError(f"SECATEUR_DATA: expected a folder, got {named!r}. Do set it to one.")
        return Path(named)
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    return beside if beside.is_dir() else None


def require(*names: str) -> Path:
    """The data folder, if it holds all these files; else says what is missing and ends the program.

    Raises:
        SystemExit: With status 0: there is nothing to measure, and nothing failed.
    """
    directory = data_directory()
    if directory is None:
        print("Skipped: no data folder. Do set SECATEUR_DATA to one; see benchmarks/cifar.py.")
        raise SystemExit(0)
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        print(f"Skipped: {directory} has no {', '.join(missing)}.")
        raise SystemExit(0)
    return directory


@cache
def _archive(path: Path) -> tuple[bytes, NDArray[np.int64], NDArray[np.uint8]]:
    """All JPEG bytes joined, where each image starts and ends in them [N + 1], and the labels [N]."""
    with np.load(path, allow_pickle=False) as archive:
        return archive["jpeg"].tobytes(), archive["offsets"], archive["labels"]


def load(split: Split, count: int | None = None, start: int = 0) -> tuple[Tensor, Tensor]:
    """Decodes images `start` to `start + count` of a split, in the order they are stored in.

    The training images are shuffled already, so the first of them are a fair sample.

    Args:
        split: ``train`` (48,000 images) or ``test`` (3,000).
        count: How many; None for all from `start` on.
        start: The first.

    Returns:
        Images, normalised, float32 [count, 3, 32, 32], and their labels, int64 [count].

    Raises:
        ValueError: If the split has fewer images.
        SystemExit: With status 0, where the data is absent.
    """
    images, labels = decode(f"cifar10_{split}.npz", count, start)
    return normalise(images), labels


def decode(name: str, count: int | None = None, start: int = 0) -> tuple[NDArray[np.uint8], Tensor]:
    """Decodes some pictures of an archive of the data folder.

    Args:
        name: The archive; all its pictures have one size.
        count: How many; None for all from `start` on.
        start: The first.

    Returns:
        RGB bytes [count, height, width, 3], and the labels, int64 [count].

    Raises:
        ValueError: If the archive has fewer pictures.
        SystemExit: With status 0, where the data is absent.
    """
    jpeg, offsets, labels = _archive(require(name) / name)
    stop = len(labels) if count is None else start + count
    if not 0 <= start < stop <= len(labels):
        raise ValueError(f"{name}: expected pictures within [0, {len(labels)}), got [{start}, {stop}).")
    images = []
    for i in range(start, stop):
        with Image.open(io.BytesIO(jpeg[offsets[i] : offsets[i + 1]])) as image:
            images.append(np.asarray(image.convert("RGB")))
    return np.stack(images), torch.from_numpy(labels[start:stop].astype(np.int64))


def normalise(images: NDArray[np.uint8]) -> Tensor:
    """Bytes [N, H, W, 3] to what the networks expect, float32 [N, 3, H, W]."""
    scaled = torch.from_numpy(images).permute(0, 3, 1, 2).to(torch.float32) / 255
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return ((scaled - mean) / std).contiguous()
