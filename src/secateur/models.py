"""A user's module: what is inside its wrappers, where it lives, and evaluation mode for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from secateur.errors import SettingError


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside `torch.compile`, `DataParallel` or `DistributedDataParallel`.

    Raises:
        SettingError: If `model` is not an `nn.Module`.
    """
    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            break
        model = inner
    if not isinstance(model, nn.Module):
        raise SettingError(f"model: expected a torch.nn.Module, got {type(model).__name__}.")
    return model


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block, without key-value caches; everything is restored afterwards.

    A language model whose configuration says `use_cache` returns its cache beside its logits, which no
    capture can hold and no comparison needs.
    """
    modes = [(module, module.training) for module in model.modules()]
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    caching = [c for c in configs.values() if getattr(c, "use_cache", False) is True]
    model.eval()
    try:
        for config in caching:
            config.use_cache = False
        yield
    finally:
        for config in caching:
            config.use_cache = True
        for module, mode in modes:
            module.training = mode


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first tensor lives (the CPU if it has none)."""
    return next((t.device for t in model.state_dict().values()), torch.device("cpu"))
