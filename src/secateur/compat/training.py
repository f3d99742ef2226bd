"""Private parts of trainers and model wrappers, needed to prune a model while it is trained."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel


def compiled_module(model: nn.Module) -> nn.Module | None:
    """Return the module inside a model that `torch.compile` returned; None for other models."""
    inner: nn.Module | None = getattr(model, "_orig_mod", None)
    return inner


def rewrap(ddp: DistributedDataParallel) -> None:
    """Initialise a DistributedDataParallel again, in place, with the current parameters of its module.

    It registers parameters only when it is made, so new parameters need a new initialisation. Its
    settings, hooks and communication hooks are kept.
    """
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
    communication, training = list(getattr(ddp, "_comm_hooks", ())), ddp.training
    for held in ("reducer", "logger"):
        vars(ddp).pop(held, None)  # it refers to the old parameters
    DistributedDataParallel.__init__(ddp, ddp.module, **settings)
    vars(ddp).update(hooks)
    ddp.training = training
    for hook, state in communication:
        ddp.register_comm_hook(state, hook)


@contextmanager
def own_forward(model: nn.Module) -> Iterator[None]:
    """Inside the block, the model has the `forward` of its class, not the one that Accelerate patched in."""
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


def before_loading(trainer: Any, prepare: Callable[[str, nn.Module | None], None]) -> None:
    """Make a Transformers Trainer call `prepare` before it loads a checkpoint's tensors.

    The Trainer's callbacks hear of a checkpoint only after it was loaded, which is too late.

    Args:
        trainer: The Trainer. It is changed in place.
        prepare: Called with the checkpoint's folder, and with the model to load into (None for the
            Trainer's own model).
    """
    load = trainer._load_from_checkpoint

    def prepared(resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        prepare(resume_from_checkpoint, model)
        load(resume_from_checkpoint, model)

    trainer._load_from_checkpoint = prepared


def output_folder(trainer: Any) -> str:
    """Return the folder in which a Transformers Trainer writes its checkpoints."""
    return str(trainer._get_output_dir(trial=None))


def name_on_hub(model: nn.Module) -> str:
    """Return the hub name or folder that Transformers loaded a model from; empty for other models."""
    found = getattr(getattr(model, "config", None), "_name_or_path", "")
    return found if isinstance(found, str) else ""
