"""Wrappers of a model in training: DistributedDataParallel and torch.compile."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from secateur.compat.training import compiled_module, rewrap
from secateur.errors import SettingError

_SHARDING = ("FullyShardedDataParallel", "FSDPModule", "DeepSpeedEngine")


def refresh(model: nn.Module) -> None:
    """Tell the wrappers around a model that its parameters were replaced.

    A DistributedDataParallel is initialised again in place, because it registers parameters only then.
    Every process must call this; all get the first process's tensors. Code from `torch.compile` is dropped.
    """
    while isinstance(model, nn.Module):
        inner = compiled_module(model)
        if inner is not None:
            torch.compiler.reset()
        elif isinstance(model, nn.DataParallel | DistributedDataParallel):
            inner = model.module
            if isinstance(model, DistributedDataParallel):
                rewrap(model)
        if inner is None:
            return
        model = inner


def check_whole(model: nn.Module) -> None:
    """Check that each process holds the whole model, in a wrapper that `refresh` supports.

    Raises:
        SettingError: If the model is sharded, or DistributedDataParallel uses mixed precision.
    """
    for module in model.modules():
        kinds = {kind.__name__ for kind in type(module).__mro__}
        if found := kinds.intersection(_SHARDING):
            raise SettingError(
                f"gradual pruning: expected the whole model in each process, got {found.pop()}. "
                "Train with DistributedDataParallel."
            )
        if isinstance(module, DistributedDataParallel) and module.mixed_precision is not None:
            raise SettingError(
                "gradual pruning: expected DistributedDataParallel without mixed_precision, got "
                f"{module.mixed_precision}. Use torch.autocast."
            )
