"""Weights that Accelerate keeps elsewhere between two calls of their layer.

Under a device map or CPU offload a layer's own weight is an empty one on the device ``meta``; a hook on the
layer fetches the real one from a map when the layer is called. Accelerate itself is not needed here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import SettingError
from secateur.models import named_tensors


def stored(layer: nn.Module, name: str = "weight") -> Tensor:
    """A layer's tensor with its values, wherever they are kept.

    Raises:
        SettingError: The tensor is empty, and no hook of Accelerate's says where its values are.
    """
    own: Tensor = getattr(layer, name)
    if not own.is_meta:
        return own
    weights = _map(layer)
    if weights is None:
        raise SettingError(
            f"masks: expected a {name} with values in {type(layer).__name__}, got an empty one on the device "
            "'meta'. Load the weights first."
        )
    found: Tensor = weights[name]
    return found


@torch.no_grad()
def store(layer: nn.Module, value: Tensor, name: str = "weight") -> None:
    """Give a layer's tensor new values, wherever they are kept.

    Raises:
        SettingError: They are kept on disk, where nothing can be written to.
    """
    if not _held(layer, name):
        raise SettingError(
            f"masks: expected weights that can be written, got those of {type(layer).__name__} on disk. "
            "Offload them to the CPU instead, or load the model whole."
        )
    stored(layer, name).copy_(value)


def values_of(model: nn.Module) -> dict[str, Tensor]:
    """The state dict, with the values of what is offloaded."""
    found: dict[str, Tensor] = {}
    for name, tensor in named_tensors(model).items():
        path, _, last = name.rpartition(".")
        found[name] = stored(model.get_submodule(path), last) if tensor.is_meta else tensor
    return found


def same_tensor(layer: nn.Module, name: str) -> int:
    """A number that is the same for tied tensors; of tensors on disk nothing tells that they are tied."""
    own: Tensor = getattr(layer, name)
    elsewhere = own.is_meta and _map(layer) is not None and _held(layer, name)
    return stored(layer, name).data_ptr() if elsewhere else id(own)


def input_device(model: nn.Module) -> torch.device | None:
    """Where batches go; None where hooks of Accelerate's move them."""
    if getattr(model, "_hf_hook", None) is not None:
        return None
    return next((t.device for t in named_tensors(model).values() if not t.is_meta), torch.device("cpu"))


def _held(layer: nn.Module, name: str) -> bool:
    """Whether a tensor lies in memory: what is on disk is read anew each time."""
    first, second = stored(layer, name), stored(layer, name)
    return first.data_ptr() == second.data_ptr()


def _map(layer: nn.Module) -> Mapping[str, Tensor] | None:
    """What a hook on a layer fetches its tensors from."""
    hook: Any = getattr(layer, "_hf_hook", None)
    for each in getattr(hook, "hooks", (hook,)):
        found: Mapping[str, Tensor] | None = getattr(each, "weights_map", None)
        if found is not None:
            return found
    return None
