"""What stands around a model in training: DistributedDataParallel, torch.compile, Accelerate's autocast."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from secateur.errors import SettingError

_SHARDING = ("FullyShardedDataParallel", "FSDPModule", "DeepSpeedEngine")


def refresh(model: nn.Module) -> None:
    """Let the wrappers around a model notice that its parameters are others.

    A DistributedDataParallel, which registered them when it was made, is made anew in place; every process
    has to call this, and starts with the first one's tensors. What `torch.compile` compiled is forgotten.
    """
    while isinstance(model, nn.Module):
        inner = getattr(model, "_orig_mod", None)
        if inner is not None:
            torch.compiler.reset()
        elif isinstance(model, nn.DataParallel | DistributedDataParallel):
            inner = model.module
            if isinstance(model, DistributedDataParallel):
                _rewrap(model)
        if inner is None:
            return
        model = inner


def check_whole(model: nn.Module) -> None:
    """Make sure that each process holds the whole model, in a way that `refresh` can follow.

    Raises:
        SettingError: It is sharded, or DistributedDataParallel casts it.
    """
    for module in model.modules():
        kinds = {kind.__name__ for kind in type(module).__mro__}
        if found := kinds.intersection(_SHARDING):
            raise SettingError(
                f"gradual pruning: expected the whole model in each process, got {found.pop()}. "
                "Do train with DistributedDataParallel."
            )
        if isinstance(module, DistributedDataParallel) and module.mixed_precision is not None:
            raise SettingError(
                "gradual pruning: expected DistributedDataParallel without mixed_precision, got "
                f"{module.mixed_precision}. Do use torch.autocast."
            )


def _rewrap(ddp: DistributedDataParallel) -> None:
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    settings: dict[str, Any] = {
        name: getattr(ddp, name)
        for name in (
            "device_ids",
            "output_device",
            "dim",
            "process_group",
            "find_unused_parameters",
            "gradient_as_bucket_view",
            "static_graph",
            "skip_all_reduce_unused_params",
            "batched_grad_copy",
        )
        if name in known and hasattr(ddp, name)
    }
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    settings[buffers] = getattr(ddp, buffers)
    if not getattr(ddp, "bucket_bytes_cap_default", True):
        settings["bucket_cap_mb"] = ddp.bucket_bytes_cap / 2**20
    hooks = {name: vars(ddp)[name] for name in vars(nn.Module()) if "hooks" in name}
    talks, training = list(getattr(ddp, "_comm_hooks", ())), ddp.training
    for held in ("reducer", "logger"):
        vars(ddp).pop(held, None)  # it watches parameters that are gone
    DistributedDataParallel.__init__(ddp, ddp.module, **settings)
    vars(ddp).update(hooks)
    ddp.training = training
    for hook, state in talks:
        ddp.register_comm_hook(state, hook)


@contextmanager
def as_written(model: nn.Module) -> Iterator[None]:
    """The model with its class's forward inside the block, without Accelerate's autocast around it."""
    names = ("forward", "_original_forward")
    patched: dict[str, Any] = {name: vars(model)[name] for name in names if name in vars(model)}
    if "_original_forward" not in patched:
        yield
        return
    for name in patched:
        del vars(model)[name]
    try:
        yield
    finally:
        vars(model).update(patched)
