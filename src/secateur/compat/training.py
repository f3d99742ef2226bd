"""What trainers and wrappers keep private, for pruning while a model is trained."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel


def compiled_module(model: nn.Module) -> nn.Module | None:
    """The module inside what `torch.compile` returned; None for any other."""
    inner: nn.Module | None = getattr(model, "_orig_mod", None)
    return inner


def rewrap(ddp: DistributedDataParallel) -> None:
    """Make a DistributedDataParallel anew in place, over the parameters that its module has now.

    It registers parameters when it is made, and offers no way to register others. Its settings, hooks and
    communication hooks stay.
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
        vars(ddp).pop(held, None)  # it watches parameters that are gone
    DistributedDataParallel.__init__(ddp, ddp.module, **settings)
    vars(ddp).update(hooks)
    ddp.training = training
    for hook, state in communication:
        ddp.register_comm_hook(state, hook)


@contextmanager
def own_forward(model: nn.Module) -> Iterator[None]:
    """The model with the forward of its class inside the block, without the autocast of Accelerate."""
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
    """Let a Trainer of Transformers call `prepare` before it loads a checkpoint's tensors.

    Its callbacks are told of a checkpoint only when it has been loaded.

    Args:
        trainer: The Trainer; changed in place.
        prepare: Gets the checkpoint's folder, and the model to load it into if that is not the Trainer's own.
    """
    load = trainer._load_from_checkpoint

    def prepared(resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        prepare(resume_from_checkpoint, model)
        load(resume_from_checkpoint, model)

    trainer._load_from_checkpoint = prepared


def output_folder(trainer: Any) -> str:
    """Where a Trainer of Transformers writes its checkpoints."""
    return str(trainer._get_output_dir(trial=None))


def name_on_hub(model: nn.Module) -> str:
    """Where Transformers loaded a model from, a name on the hub or a folder; empty if it did not."""
    found = getattr(getattr(model, "config", None), "_name_or_path", "")
    return found if isinstance(found, str) else ""
