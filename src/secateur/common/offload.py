"""Read and write weights that Accelerate has offloaded to the CPU or to disk.

With a device map or CPU offload, a layer's own weight is an empty tensor on the device ``meta``. When the
layer is called, a hook fetches the real weight from a mapping. This module reads that mapping directly and
does not import Accelerate.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from secateur.common.models import named_tensors
from secateur.errors import SettingError


def stored(layer: nn.Module, name: str = "weight") -> Tensor:
    """Return a layer's tensor with its values, also if the layer is offloaded.

    Raises:
        SettingError: The tensor is on ``meta``, and no hook of Accelerate knows its values.
    """
    own: Tensor = getattr(layer, name)
    if not own.is_meta:
        return own
    weights = _offloaded_tensors(layer)
    if weights is None:
        raise SettingError(
            f"masks: expected a {name} with values in {type(layer).__name__}, got an empty one on the device "
            "'meta'. Load the weights first."
        )
    found: Tensor = weights[name]
    return found


@torch.no_grad()
def store(layer: nn.Module, value: Tensor, name: str = "weight") -> None:
    """Write new values to a layer's tensor, also if the layer is offloaded to the CPU.

    Raises:
        SettingError: The values are offloaded to disk, which is read-only here.
    """
    if not is_in_memory(layer, name):
        raise SettingError(
            f"masks: expected weights that can be written, got those of {type(layer).__name__} on disk. "
            "Offload them to the CPU instead, or load the model whole."
        )
    stored(layer, name).copy_(value)


def values_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict, with real values in place of offloaded tensors."""
    found: dict[str, Tensor] = {}
    for name, tensor in named_tensors(model).items():
        path, _, last = name.rpartition(".")
        found[name] = stored(model.get_submodule(path), last) if tensor.is_meta else tensor
    return found


def same_tensor(layer: nn.Module, name: str) -> int:
    """Return a number that identifies a tensor: two tied tensors have the same one.

    Tied tensors that are offloaded to disk get different numbers, because nothing shows that they are tied.
    """
    own: Tensor = getattr(layer, name)
    offloaded = own.is_meta and _offloaded_tensors(layer) is not None and is_in_memory(layer, name)
    return stored(layer, name).data_ptr() if offloaded else id(own)


def input_device(model: nn.Module) -> torch.device | None:
    """Return the device that batches must be on; None if hooks of Accelerate move them."""
    if getattr(model, "_hf_hook", None) is not None:
        return None
    return next((t.device for t in named_tensors(model).values() if not t.is_meta), torch.device("cpu"))


def is_in_memory(layer: nn.Module, name: str) -> bool:
    """Whether a tensor is in memory. A tensor on disk is read again, to a new address, each time."""
    first, second = stored(layer, name), stored(layer, name)
    return first.data_ptr() == second.data_ptr()


def is_tied(layer: nn.Module, name: str) -> bool:
    """Whether Accelerate has noted that an offloaded tensor is tied to another one."""
    hook: Any = getattr(layer, "_hf_hook", None)
    return any(name in getattr(each, "tied_params_names", ()) for each in getattr(hook, "hooks", (hook,)))


def _offloaded_tensors(layer: nn.Module) -> Mapping[str, Tensor] | None:
    """The mapping from which Accelerate's hook fetches a layer's tensors; None without such a hook."""
    hook: Any = getattr(layer, "_hf_hook", None)
    for each in getattr(hook, "hooks", (hook,)):
        found: Mapping[str, Tensor] | None = getattr(each, "weights_map", None)
        if found is not None:
            return found
    return None
