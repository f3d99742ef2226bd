"""A module of Lightning and its Trainer, for tests."""

from __future__ import annotations

import logging
import os
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from secateur.integrations import GradualPruner
from tests.integrations.training import batches, network
from tests.zoo.importing import import_torchvision

import_torchvision()  # which Lightning imports

import lightning.pytorch  # noqa: E402

from secateur.integrations.lightning import GradualPruning  # noqa: E402

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Steps:
    """What a module of either package does: it holds the network that is pruned."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        self.log("loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 0.01)


class Classifier(Steps, lightning.pytorch.LightningModule):  # type: ignore[misc]
    """A module of Lightning."""


def loader(batch_size: int = 32) -> DataLoader[Any]:
    """Three batches an epoch, or fewer."""
    x, y = (torch.cat(part) for part in zip(*batches(8), strict=True))
    return DataLoader(TensorDataset(x, y), batch_size=batch_size)


def a_trainer(folder: str | os.PathLike[str], steps: int, library: Any = None, **settings: Any) -> Any:
    return (library or lightning.pytorch).Trainer(
        **{
            "max_steps": steps,
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": folder,
            **settings,
        }
    )


def fit(
    module: nn.Module,
    pruner: GradualPruner,
    folder: str | os.PathLike[str],
    steps: int,
    *,
    part: str = "net",
    batch_size: int = 32,
    ckpt_path: Any = None,
    **settings: Any,
) -> Any:
    trainer = a_trainer(folder, steps, callbacks=[GradualPruning(pruner, part)], **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on loaders
        trainer.fit(module, loader(batch_size), ckpt_path=ckpt_path)
    return trainer
