"""Where data come from: a function, a ``.npz`` or text file, a folder of images, a Hugging Face dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from secateur.cli.loading.arrays import arrays
from secateur.cli.loading.models import ModelSource
from secateur.cli.loading.pictures import class_folders, pictures
from secateur.cli.loading.table import is_table, table
from secateur.cli.loading.target import Target
from secateur.cli.loading.tokens import tokens
from secateur.config.run import ImagesSection, TextSection
from secateur.errors import CalibrationError, SettingError

TEXTS = (".txt", ".text", ".md")


def check_data(option: str, text: str) -> None:
    """Refuses what names no data, without loading anything.

    Raises:
        SettingError: If it is of none of the kinds there are.
        CalibrationError: If there is no such file, or the folder holds nothing to read.
    """
    path = Path(text)
    if path.suffix in (".npz", *TEXTS):
        if not path.is_file():
            raise CalibrationError(f"{option} {path}: expected a file, got none there. Check the path.")
    elif path.is_dir():
        if not is_table(path):
            class_folders(option, path)
    elif ":" in text:
        Target.of(option, text)
    else:
        raise SettingError(
            f"{option} {text}: expected package.module:function, a .npz or .txt file, or a folder, got none "
            f"of them. Write {option} data.py:load or {option} images.npz, for example."
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
    """What `Calibration.of` takes.

    Args:
        option: The option the text was given to, for messages.
        text: What a user wrote.
        batch_size: Samples a batch, where the data do not say.
        seed: Of the order that samples of files are put in.
        samples: At most this many of a file's or folder's.
        images: How pictures become inputs.
        texts: How text becomes inputs.
        source: The model, which may know how its inputs are made.

    Raises:
        SettingError: If the function is missing or fails, or a library is.
        CalibrationError: If the file is missing or does not hold what it should.
    """
    check_data(option, text)
    if batch_size < 1:
        raise SettingError(f"--batch-size {batch_size}: expected at least 1. Give 64, for example.")
    images, texts = images or ImagesSection(), texts or TextSection()
    path = Path(text)
    if path.suffix == ".npz":
        return arrays(option, path, batch_size, seed, samples)
    if path.suffix in TEXTS:
        return tokens(option, path, texts, source, batch_size, seed, samples)
    if path.is_dir() and is_table(path):
        return table(option, path, images, texts, source, batch_size, seed, samples)
    if path.is_dir():
        return pictures(option, path, images, source, batch_size, seed, samples)
    target = Target.of(option, text)
    found = target.find()
    return target.call() if callable(found) else found
