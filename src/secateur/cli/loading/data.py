"""Load data from a function, a file, a folder of images or a data set; or make example inputs."""

from __future__ import annotations

import hashlib
import math
import os
import re
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.cli.loading.archives import Archive, archive_loader
from secateur.cli.loading.arrays import arrays
from secateur.cli.loading.models import ModelSource
from secateur.cli.loading.pictures import class_folders, pictures
from secateur.cli.loading.table import is_table, table
from secateur.cli.loading.target import Target
from secateur.cli.loading.tokens import tokens
from secateur.errors import CalibrationError, SettingError

if TYPE_CHECKING:
    import torch

    from secateur.config.sections import ImagesSection, TextSection

TEXTS = (".txt", ".text", ".md")


def check_data(option: str, text: str) -> None:
    """Check that a text names data, without loading anything.

    Raises:
        SettingError: If it is no kind of data that is known.
        CalibrationError: If there is no such file, or the folder holds nothing to read.
    """
    path = Path(text)
    if path.suffix in (".npz", *TEXTS):
        if not os.path.isfile(path):
            raise CalibrationError(f"{option} {path}: expected a file, got none there. Check the path.")
    elif os.path.isdir(path):
        if not is_table(path):
            class_folders(option, path)
    elif (published := Archive.of(option, text)) is not None:
        published.files()
    elif ":" in text:
        Target.of(option, text)
    else:
        raise SettingError(
            f"{option} {text}: expected package.module:function, a .npz or .txt file, a folder, or "
            f"cifar10:FOLDER, got none of them. Write {option} data.py:load or {option} images.npz, for "
            "example."
        )


def load_data(
    option: str,
    text: str,
    *,
    batch_size: int = 64,
    seed: int = 0,
    samples: int | None = None,
    images: ImagesSection | None = None,
    texts: TextSection | None = None,
    source: ModelSource | None = None,
) -> Any:
    """Load data in a form that `Calibration.of` accepts.

    Args:
        option: The option that the text was given to, for messages.
        text: The user's text, which names the data.
        batch_size: Samples in a batch, unless the data come in batches.
        seed: Seed for shuffling the samples of files.
        samples: Largest number of samples to take from a file or folder.
        images: How pictures become inputs.
        texts: How text becomes inputs.
        source: The model, which may define how its inputs are made.

    Raises:
        SettingError: The function is missing or fails, or a library is missing.
        CalibrationError: The file is missing or has other content.
    """
    check_data(option, text)
    if batch_size < 1:
        raise SettingError(f"--batch-size {batch_size}: expected at least 1. Give 64, for example.")
    from secateur.config.sections import ImagesSection, TextSection

    images, texts = images or ImagesSection(), texts or TextSection()
    path = Path(text)
    if path.suffix == ".npz":
        return arrays(option, path, batch_size, seed, samples)
    archive = None if os.path.isdir(path) else Archive.of(option, text)
    if path.suffix in TEXTS:
        found = tokens(option, path, texts, source, batch_size, seed, samples)
    elif os.path.isdir(path) and is_table(path):
        found = table(option, path, images, texts, source, batch_size, seed, samples)
    elif os.path.isdir(path):
        found = pictures(option, path, images, source, batch_size, seed, samples)
    elif archive is not None:
        found = archive_loader(archive, images, source, batch_size, seed, samples)
    else:
        target = Target.of(option, text)
        found = target.find()
        return target.call() if callable(found) else found
    files = sorted(path.rglob("*")) if os.path.isdir(path) else [path]
    found.dataset.content = _stamps(files if archive is None else archive.files()[0])
    return found


def _stamps(files: Iterable[Path]) -> str:
    """Return a digest of the names, sizes and times of files. A resumed run compares it to find changes."""
    found = hashlib.sha256()
    for path in files:
        with suppress(OSError):  # a link to nothing
            about = path.stat()
            if stat.S_ISREG(about.st_mode):
                found.update(
                    f"{path.as_posix()} {about.st_size} {about.st_mtime_ns}\n".encode(errors="replace")
                )
    return found.hexdigest()


def example_of(text: str, seed: int = 0) -> torch.Tensor:
    """Make a tensor from ``1x3x224x224`` or ``1x16:int64``. Floats are normally distributed, integers zero.

    Args:
        text: The user's text.
        seed: Seed of the floats.

    Raises:
        SettingError: The text has another form.

    Example:
        >>> example_of("2x16:int64").shape
        torch.Size([2, 16])
    """
    import torch

    sizes, _, name = text.partition(":")
    dtype = getattr(torch, name or "float32", None)
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sizes) or not isinstance(dtype, torch.dtype):
        raise SettingError(
            f"--input {text}: expected sizes and, if not float32, a dtype, got something else. "
            "Write 1x3x224x224 or 1x16:int64, for example."
        )
    shape = [int(size) for size in sizes.split("x")]
    if math.prod(shape) > 2**31:
        raise SettingError(f"--input {text}: expected an input that fits into memory. Give a smaller one.")
    if not dtype.is_floating_point:
        return torch.zeros(shape, dtype=dtype)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
