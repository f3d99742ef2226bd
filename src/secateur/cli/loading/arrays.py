"""Read calibration data from a ``.npz`` file."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from secateur.errors import CalibrationError, SettingError

if TYPE_CHECKING:
    import torch

INPUT_NAMES, LABEL_NAMES = ("x", "inputs", "images"), ("y", "labels")


def arrays(
    option: str, path: Path, batch_size: int, seed: int, samples: int | None = None
) -> list[tuple[torch.Tensor, ...]]:
    """Read batches from a ``.npz`` file, shuffled with `seed`, because files are often sorted by class.

    Raises:
        SettingError: If the batch size is none.
        CalibrationError: If the file is missing or does not hold what it should.
    """
    import numpy as np
    import torch

    where = f"{option} {path}"
    if batch_size < 1:
        raise SettingError(f"--batch-size {batch_size}: expected at least 1. Give 64, for example.")
    if not path.is_file():
        raise CalibrationError(f"{where}: expected a file, got none there. Check the path.")
    try:
        with np.load(path, allow_pickle=False) as file:
            held = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise CalibrationError(
            f"{where}: expected arrays as numpy.savez writes them, got a file that cannot be read ({error}). "
            "Save it again, without objects."
        ) from error
    shapes = (
        ", ".join(f"{name} {list(array.shape)} {array.dtype}" for name, array in held.items()) or "no array"
    )
    inputs = next((held[name] for name in INPUT_NAMES if name in held), None)
    labels = next((held[name] for name in LABEL_NAMES if name in held), None)
    if inputs is None:
        raise CalibrationError(
            f"{where}: expected an array named x, inputs or images, and labels named y or labels, "
            f"got {shapes}. Do numpy.savez(path, x=..., y=...)."
        )
    if inputs.ndim == 0 or len(inputs) == 0:
        raise CalibrationError(f"{where}: expected samples along axis 0, got {shapes}. Save at least two.")
    if inputs.dtype == np.uint8:
        raise CalibrationError(
            f"{where}: expected inputs as the model takes them, got raw bytes ({shapes}). "
            "Normalise them as in training and save them as float32."
        )
    if inputs.dtype.kind not in "fiub":
        raise CalibrationError(f"{where}: expected inputs that are numbers, got {shapes}. Save float32.")
    if labels is not None and (labels.ndim == 0 or len(labels) != len(inputs)):
        raise CalibrationError(
            f"{where}: expected a label for each input, got {shapes}. Save arrays of one length."
        )
    if labels is not None and labels.dtype.kind not in "fiub":
        raise CalibrationError(f"{where}: expected labels that are numbers, got {shapes}. Save integers.")
    arrays = [inputs] if labels is None else [inputs, labels]
    order = np.random.default_rng(seed).permutation(len(inputs))[:samples]
    kinds = {"f": torch.get_default_dtype(), "i": torch.int64, "u": torch.int64, "b": torch.bool}
    tensors = [torch.from_numpy(array[order]).to(kinds[array.dtype.kind]) for array in arrays]
    return list(zip(*(tensor.split(batch_size) for tensor in tensors), strict=True))
