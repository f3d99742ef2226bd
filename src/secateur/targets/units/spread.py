"""Models that Accelerate has spread over the CPU, a disk and a device: copies that have all values.

With a device map, a layer's own weight is often an empty tensor on the device ``meta``, and a hook fetches
the values when the layer is called. No capture can follow that. So units are removed from a copy without
hooks. It shares the tensors that are in memory; those on disk are kept in temporary files
(`secateur.common.mapped`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from secateur.common import mapped
from secateur.common.offload import is_in_memory, is_tied, stored
from secateur.errors import SettingError
from secateur.targets.units.copying import duplicate

_HOOK, _FORWARD = "_hf_hook", "_old_forward"


def gathered(model: nn.Module) -> nn.Module:
    """Return a module without Accelerate's hooks that has all values; a model without hooks as it is.

    Args:
        model: It is not changed. The result shares its tensors that are in memory.

    Raises:
        SettingError: Its tensors are on several devices beside the CPU, or a tensor has no values.
        ArtefactError: The disk has too little room for temporary files.
    """
    hooked = [module for module in model.modules() if _HOOK in vars(module)]
    if not hooked:
        return model
    values: dict[int, Tensor] = {}  # by the id of the tensor on ``meta`` that stands for them
    loaded: list[Tensor] = []
    for _, _, own in _tensors(model):
        if not own.is_meta:
            values[id(own)] = own
            loaded.append(own)
    for module, name, own in _tensors(model):
        if id(own) not in values:
            values[id(own)] = _value(module, name, own, loaded)
    memo: dict[int, object] = {**values}
    for module in hooked:
        memo[id(vars(module)[_HOOK])] = None
    plain = duplicate(model, memo)
    for module in plain.modules():
        _restore_forward(module)
    _check_devices(plain)
    return plain


def _tensors(model: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Yield each tensor of each module, with its name there."""
    for module in model.modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                yield module, name, tensor


def _value(module: nn.Module, name: str, own: Tensor, loaded: list[Tensor]) -> Tensor:
    """Return the values of a tensor on ``meta``: one of `loaded` if the two are tied, else a new tensor."""
    value = stored(module, name)
    in_memory = is_in_memory(module, name)
    for other in loaded:
        same = other.data_ptr() == value.data_ptr() if in_memory else is_tied(module, name)
        if same and _equal(other, value):
            return other
    if not in_memory and value.nbytes >= mapped.SMALL:  # read from the disk: it must not stay in memory
        value = mapped.empty_file(value.numel(), value.dtype).view(value.shape).copy_(value)
    found = nn.Parameter(value, own.requires_grad) if isinstance(own, nn.Parameter) else value
    loaded.append(found)
    return found


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)


def _restore_forward(module: nn.Module) -> None:
    """Take Accelerate's hook off a module of the copy."""
    own: dict[str, Any] = vars(module)
    if _HOOK not in own:
        return
    del own[_HOOK]
    own.pop("forward", None)
    before = own.pop(_FORWARD, None)
    if before is not None and getattr(before, "__func__", None) is not type(module).forward:
        own["forward"] = before  # one of the module's own, which the hook has wrapped


def _check_devices(model: nn.Module) -> None:
    devices = sorted({str(tensor.device) for _, _, tensor in _tensors(model)})
    if len(devices) > 1:
        raise SettingError(
            f"model: expected tensors on one device, or on the CPU and a disk, got {', '.join(devices)}. "
            "Load the model without a device map; sc.map_weights takes one that does not fit into memory."
        )
