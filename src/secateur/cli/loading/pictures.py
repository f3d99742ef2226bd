"""Data from a folder of images, one folder a class."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.cli.loading.models import HuggingFaceModel, ModelSource, TimmModel, library_errors
from secateur.common.paths import entries
from secateur.config.sections import ImagesSection
from secateur.errors import CalibrationError, SettingError

if TYPE_CHECKING:
    import torch

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
MEAN, STD, SIZE, CROP = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 224, 0.875
"""ImageNet's, which most published models take; `CROP` is what a crop leaves of a resized picture's side."""

LARGEST = 1 << 26
"""Pixels of a picture: a small file may unpack to gigabytes."""

Prepare = Callable[[Any], Any]
"""A picture of Pillow to a tensor [channels, height, width], or a mapping of such."""


def class_folders(option: str, folder: Path) -> list[Path]:
    """The folders of the classes, in the order of their names.

    Raises:
        CalibrationError: If there is none.
    """
    found = [
        path
        for path in entries(folder, option, CalibrationError)
        if os.path.isdir(path) and not path.name.startswith(".")
    ]
    if not found:
        raise CalibrationError(
            f"{option} {folder}: expected images in one folder a class, or a Hugging Face dataset, got no "
            "folder in it. Sort the images by class."
        )
    return found


def pictures(
    option: str,
    folder: Path,
    images: ImagesSection,
    source: ModelSource | None,
    batch_size: int,
    seed: int,
    samples: int | None,
) -> Any:
    """A loader of ``(inputs, labels)``, or of mappings for a Hugging Face model; files are read when needed.

    Classes are numbered in the order of their folders' names. Samples come in an order drawn from `seed`.

    Raises:
        CalibrationError: If there is no image.
        SettingError: If Pillow is missing.
    """
    files = [
        (path, label)
        for label, inside in enumerate(class_folders(option, folder))
        for path in sorted(inside.rglob("*"))
        if path.suffix.lower() in SUFFIXES
    ]
    if not files:
        raise CalibrationError(
            f"{option} {folder}: expected images ({', '.join(sorted(SUFFIXES))}), got none. Check the folder."
        )
    prepare = preparation(option, images, source)

    def read(index: int) -> tuple[Any, int]:
        from PIL import Image

        path, label = files[index]
        with library_errors(f"{option} {path}", "an image", "Remove it."), Image.open(path) as image:
            if image.width * image.height > LARGEST:
                raise SettingError(
                    f"{option} {path}: expected at most {LARGEST:,} pixels, got {image.width:,} x "
                    f"{image.height:,}. Remove it, or make it smaller."
                )
            return prepare(image), label

    return loader(len(files), read, batch_size, seed, samples)


def loader(
    count: int, read: Callable[[int], tuple[Any, Any]], batch_size: int, seed: int, samples: int | None
) -> Any:
    """A DataLoader of what `read` gives for positions below `count`, in an order drawn from `seed`.

    `read` gives an input and its label, or None where there is none; where inputs are mappings, batches are.
    """
    import numpy as np
    from torch.utils.data import DataLoader, Dataset

    class Samples(Dataset[Any]):
        def __len__(self) -> int:
            return len(order)

        def __getitem__(self, index: int) -> Any:
            value, label = read(int(order[index]))
            if isinstance(value, dict):
                return value if label is None else {**value, "labels": label}
            return (value,) if label is None else (value, label)

    order = np.random.default_rng(seed).permutation(count)[:samples]
    return DataLoader(Samples(), batch_size=batch_size)


def preparation(option: str, images: ImagesSection, source: ModelSource | None) -> Prepare:
    """How a model takes its pictures: as asked for, else as the model's folder or timm says, else ImageNet's.

    Raises:
        SettingError: If Pillow is missing, or the statistics are not of one or three channels.
    """
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise SettingError(f"{option}: expected Pillow, got {error}. Run pip install pillow.") from error
    asked = any(value is not None for value in (images.size, images.mean, images.std))
    if isinstance(source, HuggingFaceModel) and not asked:
        if os.path.isfile(Path(source.folder) / "preprocessor_config.json"):
            return _processor(option, source.folder)
    own = _of_timm(source) if isinstance(source, TimmModel) else Centred(SIZE, MEAN, STD)
    mean, std = images.mean or own.mean, images.std or own.std
    if len(mean) != len(std) or len(mean) not in (1, 3):
        raise SettingError(
            f"images: expected mean and std of one or three channels, got {len(mean)} and {len(std)}. "
            "Give both."
        )
    return Centred(images.size or own.size, mean, std, own.crop)


@dataclass(frozen=True)
class Centred:
    """The middle of a picture, scaled and normalised.

    Attributes:
        size: Height and width of the result.
        mean: Subtracted from each channel of values in [0, 1].
        std: Divides each channel after that.
        crop: What the crop leaves of the shorter side.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop: float = CROP

    def __call__(self, image: Any) -> torch.Tensor:
        """The tensor, [channels, size, size]."""
        import numpy as np
        import torch
        from PIL import Image

        image = image.convert("L" if len(self.mean) == 1 else "RGB")
        scale = self.size / self.crop / min(image.size)
        wide, high = (max(self.size, round(side * scale)) for side in image.size)
        left, top = (wide - self.size) // 2, (high - self.size) // 2
        resized = image.resize((wide, high), Image.Resampling.BICUBIC)
        cut = resized.crop((left, top, left + self.size, top + self.size))
        pixels = np.asarray(cut, dtype=np.float32).reshape(self.size, self.size, -1) / 255
        normal = (pixels - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)
        return torch.from_numpy(normal.transpose(2, 0, 1).copy()).to(torch.get_default_dtype())


def _of_timm(source: TimmModel) -> Centred:
    import timm
    from timm.data.config import resolve_data_config

    known = timm.get_pretrained_cfg(source.name)
    about = {} if known is None else vars(known)
    config = resolve_data_config(dict(source.keywords), pretrained_cfg=about)
    return Centred(
        int(config["input_size"][-1]), tuple(config["mean"]), tuple(config["std"]), float(config["crop_pct"])
    )


def _processor(option: str, folder: str) -> Prepare:
    advice = "Give images.size, images.mean and images.std instead."
    with library_errors(f"{option}", f"an image processor in {folder}", advice):
        from transformers import AutoImageProcessor

        make: Any = AutoImageProcessor.from_pretrained
        processor = make(folder, local_files_only=True)

    def prepare(image: Any) -> dict[str, Any]:
        found = processor(images=image.convert("RGB"), return_tensors="pt")
        return {name: value[0] for name, value in found.items()}

    return prepare
