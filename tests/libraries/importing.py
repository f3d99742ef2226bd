"""Importing the libraries: offline, and without compiled parts that were built for another torch."""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from importlib import import_module, metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from tests.zoo.importing import import_timm, import_torchvision, import_transformers

PACKAGES = Path(__file__).with_name("packages.txt")
"""The libraries, one to a line, pinned."""

OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_DATASETS_OFFLINE": "1",
    "YOLO_OFFLINE": "true",
    "YOLO_AUTOINSTALL": "false",
    "YOLO_VERBOSE": "false",
    "WANDB_MODE": "disabled",
    "MPLBACKEND": "Agg",
    "TQDM_DISABLE": "1",
    "ACCELERATE_USE_CPU": "true",
}
"""Settings under which no library fetches anything."""


def missing(library: str) -> str:
    """Why a library cannot be used here; empty if it is installed."""
    try:
        metadata.version(library)
    except metadata.PackageNotFoundError:
        return f"{library} is not installed; `make test-libraries` installs it into its own environment."
    return ""


def prepare() -> None:
    """Makes the libraries importable; call it before any of them is imported."""
    os.environ.update(OFFLINE)
    os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.mkdtemp())
    warnings.filterwarnings("ignore")
    import_torchvision()
    _replace_nms()
    import_timm()
    _replace_torchaudio_extension()
    import_transformers()


def _replace_nms() -> None:
    """Gives torchvision a `nms` in PyTorch where its compiled one did not load."""
    if "torchvision" not in sys.modules or hasattr(torch.ops.torchvision, "nms"):
        return
    ops: Any = import_module("torchvision.ops")
    boxes: Any = import_module("torchvision.ops.boxes")
    ops.nms = boxes.nms = _nms


def _nms(boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    """Indices of the boxes that overlap with no better one, the best first. [boxes, 4], [boxes] -> [kept]"""
    order, kept = scores.argsort(descending=True, stable=True).tolist(), []
    iou = import_module("torchvision.ops").box_iou(boxes, boxes)
    for index in order:
        if all(float(iou[index, other]) <= iou_threshold for other in kept):
            kept.append(index)
    return torch.tensor(kept, dtype=torch.long, device=boxes.device)


def _replace_torchaudio_extension() -> None:
    """Keeps torchaudio from loading its compiled part, which none of its models needs."""
    if missing("torchaudio"):
        return
    extension: Any = ModuleType("torchaudio._extension")
    extension._IS_TORCHAUDIO_EXT_AVAILABLE = False
    extension.fail_if_no_align = lambda function: function
    sys.modules["torchaudio._extension"] = extension
