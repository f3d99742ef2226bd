"""Modes of PyTorch around a call, within which nothing can be measured."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from secateur.common.models import device_of, named_tensors
from secateur.errors import SettingError


def require_plain_modes(where: str, model: nn.Module, *, gradients: bool = True) -> None:
    """Refuse to start where PyTorch computes otherwise than it does by itself.

    `torch.no_grad` and `torch.inference_mode` are no such modes: gradients are turned on where needed.

    Args:
        where: The function that was called, for the message.
        model: The user's model.
        gradients: Whether some may be needed.

    Raises:
        SettingError: In `torch.autocast`, with the meta device as default, or for a model whose tensors were
            made in `torch.inference_mode`.
    """
    device = device_of(model)
    held = named_tensors(model).items()
    made = [n for n, t in held if not is_lazy(t) and t.is_inference()]
    if made and gradients:
        raise SettingError(
            f"{where}: expected a model whose tensors can have gradients, got {made[0]}, which was made in "
            f"torch.inference_mode(). Make or load the model outside of it."
        )
    if kind := next((k for k in dict.fromkeys((device.type, "cpu")) if _in_autocast(k)), None):
        got, cure = f"torch.autocast({kind!r}), which rounds", f"torch.autocast({kind!r}, enabled=False)"
        raise _refusal(where, got, cure)
    require_numbers(where, device)


def require_values(where: str, model: nn.Module) -> None:
    """Refuse a model with weights on the meta device.

    Raises:
        SettingError: It has some.
    """
    empty = next((name for name, tensor in named_tensors(model).items() if tensor.is_meta), None)
    if empty is not None:
        raise SettingError(
            f"{where}: expected weights that hold numbers, got {empty} on the meta device. Load the weights "
            "first; for files that do not fit into memory, secateur.map_weights does it."
        )


def require_numbers(where: str, device: torch.device) -> None:
    """Refuse to start where new tensors would be on the meta device, and the model is not.

    Raises:
        SettingError: They would.
    """
    if torch.get_default_device().type == "meta" != device.type:
        got = "torch.device('meta'), in which tensors hold no numbers"
        raise _refusal(where, got, f"torch.device('{device}')")


def _refusal(where: str, got: str, cure: str) -> SettingError:
    return SettingError(
        f"{where}: expected to be called in PyTorch's ordinary mode, got a call in {got}. Call it outside, "
        f"or in `with {cure}:`."
    )


def _in_autocast(kind: str) -> bool:
    try:
        return torch.is_autocast_enabled(kind)
    except RuntimeError:  # a device without it, such as meta
        return False
