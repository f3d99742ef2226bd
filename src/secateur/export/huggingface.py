"""A Hugging Face folder: what ``from_pretrained`` loads with the stock class, and a model card."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur.apply.compare import run
from secateur.apply.metadata import configuration_fits
from secateur.errors import ExportError, SettingError
from secateur.export.checking import Runs
from secateur.models import device_of

CONFIG, CARD = "config.json", "README.md"


def require_pretrained(model: nn.Module, path: Path) -> None:
    """Makes sure that a model can be written as a Hugging Face folder.

    Raises:
        SettingError: It is no model of Transformers in form ``module``, or something else is in the folder.
        ExportError: Its configuration does not say the pruned sizes.
    """
    if not hasattr(model, "save_pretrained") or not hasattr(model, "config"):
        raise SettingError(
            f"export({path}): expected a model of Transformers for a folder, got {type(model).__name__}, "
            f"which has no save_pretrained. Use secateur.save, or name a file that ends in .onnx or .pt2."
        )
    if path.exists() and not path.is_dir():
        raise SettingError(f"export({path}): expected a folder, got a file there. Name another.")
    if path.is_dir() and any(path.iterdir()) and not (path / CONFIG).is_file():
        raise SettingError(
            f"export({path}): expected an empty folder or an earlier export, got one with other files in it. "
            f"Name another."
        )
    if not configuration_fits(model):
        raise ExportError(
            f"export({path}): expected a configuration from which {type(model).__name__} can be made in the "
            f"pruned sizes, got different sizes in layers for which it holds one. Remove as much of each "
            f"layer (sc.Uniform(ratio=0.3), without a budget), or use secateur.save or .pt2, which hold "
            f"any sizes."
        )


def write_pretrained(model: nn.Module, path: Path, card: str) -> None:
    """Write configuration, tensors and model card."""
    path.mkdir()
    with _quiet():
        model.save_pretrained(path)  # type: ignore[operator]  # Transformers' own
    (path / CARD).write_text(card, encoding="utf-8")


def pretrained_runner(path: Path, model: nn.Module) -> Runs:
    """Loads the folder with the stock class, and runs that."""
    with _quiet():
        stock = type(model).from_pretrained(path, dtype="auto", local_files_only=True)  # type: ignore[attr-defined]
    stock = stock.to(device_of(model))

    def runs(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
        return run(stock, args, kwargs)

    return runs


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Transformers' bars and remarks."""
    log = logging.getLogger("transformers")
    level = log.level
    from transformers.utils import logging as bars

    shown = bars.is_progress_bar_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            log.setLevel(logging.ERROR)
            bars.disable_progress_bar()
            yield
        finally:
            log.setLevel(level)
            if shown:
                bars.enable_progress_bar()
