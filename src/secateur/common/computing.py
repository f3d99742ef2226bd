"""Computing on a device that has too little memory for the model."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from secateur.common.mapped import is_mapped
from secateur.errors import SettingError

_device: ContextVar[torch.device | None] = ContextVar("device of compute_on", default=None)

_COPIES = ("aten::copy_", "aten::_to_copy", "aten::_copy_from", "aten::_copy_from_and_resize")
"""Operators that take tensors of two devices."""

HELD_BYTES = 1 << 30
"""Most bytes of weights that wait on the device for their next use."""


@contextmanager
def compute_on(device: torch.device | str) -> Iterator[None]:
    """Inside, calibration data are processed on a device, though the model stays where it is.

    For a model that is too large for the memory of a GPU: its weights stay in main memory or in files (see
    `map_weights`), and are copied to the GPU when an operator needs them there. `score`, `repair` and `prune`
    go through a model in files part by part, so each weight is copied about once for each pass over the data.
    What is made from the data, such as sums of products, is on the GPU too. Trace, apply and verify, which
    read few samples, compute where the model is. So do signals that need gradients of weights, training, and
    the repair `batchnorm`.

    Args:
        device: The device, such as ``"cuda"``. With ``"cpu"`` nothing changes.

    Raises:
        SettingError: This machine has no such device.

    Example:
        >>> net = torch.nn.Linear(3, 2)
        >>> with compute_on("cpu"):
        ...     net(torch.ones(1, 3)).shape
        torch.Size([1, 2])
    """
    there = device_named(device, f"compute_on(device={str(device)!r})", "Pass 'cpu', or leave it out.")
    if there.type == "cpu":
        yield
        return
    token = _device.set(there)
    try:
        with _FollowTheData(there):
            yield
    finally:
        _device.reset(token)


def device_named(device: torch.device | str, where: str, advice: str) -> torch.device:
    """Return the device with this name.

    Args:
        device: The name.
        where: Where it was given, for the message.
        advice: What to do if there is none.

    Raises:
        SettingError: This machine has no such device.
    """
    try:
        return torch.zeros((), device=device).device
    except (RuntimeError, AssertionError, TypeError) as error:
        raise SettingError(
            f"{where}: expected a device of this machine, got {str(error).splitlines()[0][:120]}. {advice}"
        ) from error


def data_device(own: torch.device) -> torch.device:
    """Return where data of a model on the device `own` are processed."""
    there = _device.get()
    return own if there is None or own.type != "cpu" else there


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """Return the tensors that an operator says it writes into."""
    arguments = func._schema.arguments
    given = [
        *zip(arguments, args, strict=False),
        *((a, kwargs[a.name]) for a in arguments if a.name in kwargs),
    ]
    values = [v for a, v in given if a.alias_info is not None and a.alias_info.is_write]
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]


class _FollowTheData(TorchDispatchMode):
    """Gives an operator all of its tensors on one device: on `device` if one of them is there.

    An operator that writes into a tensor on the CPU runs on the CPU. A batch norm in training mode writes
    its statistics without saying so; see `Calibration.to_weights`.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device = device
        self._held: OrderedDict[Any, tuple[Tensor, Tensor, int]] = OrderedDict()  # weights and their copies
        self._bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Move tensors where they are on two devices, and run the operator."""
        kwargs = kwargs or {}
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if type(leaf) in (Tensor, nn.Parameter)]
        places = {tensor.device.type for tensor in given}
        if {"cpu", self._device.type} <= places and func._schema.name not in _COPIES:
            written = {tensor.device.type for tensor in _written(func, args, kwargs)}
            to = torch.device("cpu") if "cpu" in written else self._device
            args, kwargs = pytree.tree_map_only(Tensor, lambda one: self._moved(one, to), (args, kwargs))
        return func(*args, **kwargs)

    def _moved(self, tensor: Tensor, device: torch.device) -> Tensor:
        if tensor.device == device:
            return tensor
        if device.type == "cpu" or not is_mapped(tensor):
            return tensor.to(device)
        key = tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
        version = 0 if tensor.is_inference() else tensor._version
        if key in self._held:
            self._held.move_to_end(key)
            _, copy, as_of = self._held[key]
            if as_of == version:
                return copy
            self._bytes -= copy.nbytes
        copy = tensor.to(device)
        # With the original, so that nothing else can come to lie at its address.
        self._held[key] = tensor.detach(), copy, version
        self._bytes += copy.nbytes
        while self._bytes > HELD_BYTES and len(self._held) > 1:
            _, (_, gone, _) = self._held.popitem(last=False)
            self._bytes -= gone.nbytes
        return copy
