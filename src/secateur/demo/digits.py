"""Scikit-learn's handwritten digits: 1,797 images of 8×8 pixels, shipped with the package.

Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998 (its test part).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from secateur.errors import SettingError

CALIBRATION, TEST = 360, 360
BATCH = 60

Batches = list[tuple[Tensor, Tensor]]
"""``(images [batch, 1, 8, 8], labels [batch])``."""


@dataclass(frozen=True, eq=False)
class Digits:
    """The data set in three parts without common images. The split is the same in every run.

    Attributes:
        images: Training images, with zero mean and unit variance. [1077, 1, 8, 8]
        labels: The digits of the training images. [1077]
        calibration: 360 images in batches, for scoring and repair.
        test: 360 images in batches, for measuring accuracy.
    """

    images: Tensor
    labels: Tensor
    calibration: Batches
    test: Batches


def load_digits() -> Digits:
    """Read the images, normalise them and split them.

    Raises:
        SettingError: If scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise SettingError(
            f"demo: expected scikit-learn, which ships the images, got {error}. "
            'Run pip install "secateur[demo]".'
        ) from error
    found = load()
    order = np.random.default_rng(0).permutation(len(found.target))
    images = torch.from_numpy(found.images[order].astype(np.float32)).unsqueeze(1)
    labels = torch.from_numpy(found.target[order].astype(np.int64))
    training = len(labels) - CALIBRATION - TEST
    # Only the training part is used for mean and deviation, so that the other parts stay unseen.
    images = (images - images[:training].mean()) / images[:training].std()
    return Digits(
        images[:training],
        labels[:training],
        _batches(images[training : training + CALIBRATION], labels[training : training + CALIBRATION]),
        _batches(images[training + CALIBRATION :], labels[training + CALIBRATION :]),
    )


def _batches(images: Tensor, labels: Tensor) -> Batches:
    return list(zip(images.split(BATCH), labels.split(BATCH), strict=True))
