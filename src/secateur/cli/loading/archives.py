"""Read CIFAR-10, CIFAR-100 and SVHN in the layout of their archives, which torchvision uses, too."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.cli.loading.cifar import batch_of, rows_of
from secateur.cli.loading.matfile import matrices
from secateur.cli.loading.models import HuggingFaceModel, ModelSource, TimmModel
from secateur.cli.loading.pictures import loader, preparation
from secateur.common.reading import read_bytes
from secateur.config.sections import ImagesSection
from secateur.errors import CalibrationError, SettingError

if TYPE_CHECKING:
    import numpy as np

LARGEST = 1 << 31
"""The most bytes of a file."""

_DOWNLOAD_AGAIN = "Take the file from the data set's own page."

Arrays = tuple["np.ndarray[Any, Any]", "np.ndarray[Any, Any]"]


@dataclass(frozen=True)
class Layout:
    """Where a data set's files are.

    Attributes:
        folder: The folder that the archive unpacks to; empty if it unpacks into the current folder.
        train: The files of the training images, in order.
        test: The files of the test images.
        binary: Folder, training files and test files of the binary version; None if there is none.
        label: The name of the labels in a batch.
        labels: Number of label bytes before the pixels in the binary version.
        mean: Mean of each channel of the training images, in [0, 1].
        std: Standard deviation of each channel.
    """

    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    binary: tuple[str, tuple[str, ...], tuple[str, ...]] | None
    label: str
    labels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


LAYOUTS: Mapping[str, Layout] = {
    "cifar10": Layout(
        "cifar-10-batches-py",
        tuple(f"data_batch_{k}" for k in range(1, 6)),
        ("test_batch",),
        ("cifar-10-batches-bin", tuple(f"data_batch_{k}.bin" for k in range(1, 6)), ("test_batch.bin",)),
        "labels",
        1,
        (0.4914, 0.4822, 0.4465),
        (0.2470, 0.2435, 0.2616),
    ),
    "cifar100": Layout(
        "cifar-100-python",
        ("train",),
        ("test",),
        ("cifar-100-binary", ("train.bin",), ("test.bin",)),
        "fine_labels",
        2,
        (0.5071, 0.4865, 0.4409),
        (0.2673, 0.2564, 0.2762),
    ),
    "svhn": Layout(
        "",
        ("train_32x32.mat",),
        ("test_32x32.mat",),
        None,
        "y",
        0,
        (0.4377, 0.4438, 0.4728),
        (0.1980, 0.2010, 0.1970),
    ),
}


@dataclass(frozen=True)
class Archive:
    """The training or test part of a data set on disk: ``cifar10:DIR`` or ``cifar10-test:DIR``.

    Attributes:
        option: The option that it was given to, for messages.
        name: The data set's name.
        test: True for the test images, False for the training images.
        folder: The folder with the archive's folder, or that folder itself.
    """

    option: str
    name: str
    test: bool
    folder: Path

    @classmethod
    def of(cls, option: str, text: str) -> Archive | None:
        """Parse a text. None if it names no such data set, or a function in a module of that name."""
        name, colon, folder = text.partition(":")
        bare = name.removesuffix("-test")
        if not colon or bare not in LAYOUTS:
            return None
        path = Path(folder)
        if not os.path.isdir(path) and folder.isidentifier():  # a function in a module of this name
            return None
        return cls(option, bare, name != bare, path)

    @property
    def where(self) -> str:
        """The beginning of error messages."""
        return f"{self.option} {self.name}{'-test' if self.test else ''}:{self.folder}"

    def files(self) -> tuple[list[Path], bool]:
        """Return the files, and whether they are of the binary version.

        Raises:
            CalibrationError: A file is missing.
        """
        layout = LAYOUTS[self.name]
        versions = [(layout.folder, layout.train, layout.test)]
        versions += [] if layout.binary is None else [layout.binary]
        for number, (folder, train, test) in enumerate(versions):
            for place in (self.folder / folder, self.folder):
                found = [place / name for name in (test if self.test else train)]
                if all(os.path.isfile(path) for path in found):
                    return found, number == 1
        first = Path(layout.folder) / (layout.test if self.test else layout.train)[0]
        raise CalibrationError(
            f"{self.where}: expected a folder with {first.as_posix()}, as the data set's archive unpacks, "
            f"got none. Check the path."
        )

    def read(self) -> Arrays:
        """Return the images as bytes [N, 3, 32, 32], and the labels [N].

        Raises:
            CalibrationError: A file is damaged, or holds something else.
        """
        import numpy as np

        layout = LAYOUTS[self.name]
        files, binary = self.files()
        parts: list[Arrays] = []
        for path in files:
            where = f"{self.option} {path}"
            raw = read_bytes(path, LARGEST, where, CalibrationError, f"a file of {self.name}")
            if self.name == "svhn":
                parts.append(_house_numbers(raw, where))
            elif binary:
                parts.append(rows_of(raw, layout.labels, where))
            else:
                parts.append(batch_of(raw, layout.label, where))
        images, labels = (np.concatenate(each) for each in zip(*parts, strict=True))
        if not len(labels):
            raise CalibrationError(
                f"{self.where}: expected images, got none. Take the data set's own archive."
            )
        return images, labels


def _house_numbers(raw: bytes, where: str) -> Arrays:
    """Return the images and digits of SVHN, whose files write the digit 0 as 10."""
    import numpy as np

    found = matrices(raw, ("X", "y"), where)
    images, labels = found["X"], found["y"].reshape(-1)
    if images.dtype != np.uint8 or images.shape != (32, 32, 3, len(labels)):
        raise CalibrationError(
            f"{where}: expected X of bytes [32, 32, 3, {len(labels)}], got {images.dtype} "
            f"{list(images.shape)}. {_DOWNLOAD_AGAIN}"
        )
    if not np.isin(labels, np.arange(11)).all():
        raise CalibrationError(f"{where}: expected digits from 1 to 10 in y, got others. {_DOWNLOAD_AGAIN}")
    return np.ascontiguousarray(images.transpose(3, 2, 0, 1)), labels.astype(np.int64) % 10


def archive_loader(
    data: Archive,
    images: ImagesSection,
    source: ModelSource | None,
    batch_size: int,
    seed: int,
    samples: int | None,
) -> Any:
    """Return a loader of ``(inputs, labels)``, shuffled with `seed`.

    Pictures keep their 32 × 32 pixels and are normalised with the data set's own mean and standard deviation,
    or with `images.mean` and `images.std`. If `images.size` is given, or the model defines its preprocessing
    (timm, a Hugging Face folder), they are prepared like the pictures of a folder.

    Raises:
        CalibrationError: A file is missing or damaged.
        SettingError: Pillow is missing, or the statistics are not of three channels.
    """
    import numpy as np
    import torch

    layout = LAYOUTS[data.name]
    own = isinstance(source, TimmModel | HuggingFaceModel) or images.size is not None
    prepare = preparation(data.option, images, source) if own else None
    mean, std = _three(images.mean or layout.mean), _three(images.std or layout.std)
    pixels, labels = data.read()

    def read(index: int) -> tuple[Any, int]:
        label = int(labels[index])
        if prepare is not None:
            from PIL import Image

            return prepare(Image.fromarray(pixels[index].transpose(1, 2, 0))), label
        scaled = (pixels[index].astype(np.float32) / 255 - mean) / std
        return torch.from_numpy(scaled).to(torch.get_default_dtype()), label

    return loader(len(labels), read, batch_size, seed, samples)


def _three(values: Sequence[float]) -> np.ndarray[Any, Any]:
    import numpy as np

    if len(values) != 3:
        raise SettingError(f"images: expected mean and std of three channels, got {len(values)}. Give three.")
    return np.asarray(values, np.float32)[:, None, None]
