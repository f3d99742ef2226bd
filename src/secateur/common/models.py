"""A user's module: unwrap it, find its device, and run it in evaluation mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils import _pytree as pytree

from secateur.common.preserving import State, WritesUndone
from secateur.errors import SettingError
from secateur.measure.kernels import without_fast_path

A = TypeVar("A")


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module inside `torch.compile`, `DataParallel` or `DistributedDataParallel`.

    Raises:
        SettingError: `model` is no `nn.Module`, or FSDP shards it.
    """
    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            break
        model = inner
    if not isinstance(model, nn.Module):
        raise SettingError(
            f"model: expected a torch.nn.Module, got {type(model).__name__}. Pass the model itself."
        )
    if any(_SHARDED & {cls.__name__ for cls in type(module).__mro__} for module in model.modules()):
        raise SettingError(
            f"model: expected all weights in each process, got {type(model).__name__}, which FSDP shards. "
            "Call get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)) of "
            "torch.distributed.checkpoint.state_dict in every process, and load that into a plain model; or "
            "save the model and use sc.map_weights."
        )
    return model


_SHARDED = {"FSDPModule", "FullyShardedDataParallel"}
"""Classes of modules whose parameters are divided among processes."""


@contextmanager
def evaluating(
    model: nn.Module, *, training: bool = False, fast_path: bool = False, state: State | None = None
) -> Iterator[None]:
    """Run a model inside the block without lasting effects: all that forward passes change is restored.

    The model gets copies of its inputs, because it may write into them.

    Args:
        model: The model.
        training: True for training mode, False for evaluation mode.
        fast_path: Allow the fast path of PyTorch's transformer layers; only to measure how users run a model.
        state: The state to restore, if the caller has it. For training it must hold the parameters' values.
    """
    with ExitStack() as undo:
        if state is None:
            state = State(model, parameters=training)
        undo.callback(state.restore)
        undo.enter_context(evaluation_mode(model, training=training, fast_path=fast_path))
        if not isinstance(model, torch.jit.ScriptModule):  # which takes no hooks; `state` removes these
            # In training `state` has all parameters, and a mode would end the fast path.
            if not (training or fast_path):
                undo.enter_context(WritesUndone(model, in_calls=True))
            model.register_forward_pre_hook(_copied, prepend=True, with_kwargs=True)
        yield


@contextmanager
def evaluation_mode(model: nn.Module, *, training: bool = False, fast_path: bool = False) -> Iterator[None]:
    """Set evaluation or training mode inside the block, without key-value caches and the fast path.

    With `use_cache` in its configuration, a language model also returns its cache, which a capture cannot
    hold and a comparison does not need. A capture cannot hold the fast path of transformer layers either.
    """
    modes = [(module, module.training) for module in model.modules()]
    configs = {id(c): c for m, _ in modes if (c := getattr(m, "config", None)) is not None}
    caching = [c for c in configs.values() if getattr(c, "use_cache", False) is True]
    try:
        if any(mode != training for _, mode in modes):
            set_mode(model, training=training)
        for config in caching:
            config.use_cache = False
        with nullcontext() if fast_path else without_fast_path():
            yield
    finally:
        for config in caching:
            config.use_cache = True
        for module, mode in modes:
            if module.training != mode:
                module.training = mode


def set_mode(model: nn.Module, *, training: bool) -> None:
    """Switch to training or evaluation mode, even if the module's own methods refuse to."""
    try:
        model.train() if training else model.eval()
    except NotImplementedError:  # an exported program's module computes what was captured, in any mode
        for module in model.modules():
            module.training = training


def _copied(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    return copied((args, kwargs))


def copied(arguments: A) -> A:
    """Copy arguments with their tensors and containers. A tensor that occurs twice is copied once."""
    made: dict[int, Any] = {}

    def copy_of(leaf: Any) -> Any:
        if id(leaf) not in made:
            clone = getattr(leaf, "clone", None)  # tensors, and batches of graphs
            made[id(leaf)] = clone() if callable(clone) and not isinstance(leaf, nn.Module) else leaf
        return made[id(leaf)]

    found: A = pytree.tree_map(copy_of, arguments)
    return found


def named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the tensors of the state dict by name, without the extra state of some modules."""
    return {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the model's first tensor; the CPU if it has none."""
    found: torch.Tensor | None = next(model.parameters(), None)
    if found is None:
        found = next(iter(named_tensors(model).values()), None)
    return torch.device("cpu") if found is None else found.device
