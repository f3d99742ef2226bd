"""Which kernels run Transformers' experts and PyTorch's own transformer layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from torch.distributions import Distribution
from torch.nn.modules import transformer

M = TypeVar("M", bound=nn.Module)

_FIELD = "_experts_implementation"
_LOOP, _GROUPED = "eager", "grouped_mm"
_DETECT = "_detect_is_causal_mask"


def with_loop(model: M) -> M:
    """Let a copy of a Transformers model run its experts one after the other; returns it.

    The fast kernels know no float64. Other models are left as they are.
    """
    for config in _configs(model):
        setattr(config, _FIELD, _LOOP)
    return model


@contextmanager
def capturable(model: nn.Module) -> Iterator[None]:
    """Inside, experts that would run in a loop run as one grouped product, which computes the same.

    The loop goes over the experts that some token chose: how often it turns depends on the data, and no
    capture can hold that. Nor do PyTorch's distributions check their arguments inside, nor its transformers
    look whether a mask is causal, which only chooses a kernel. Everything is restored afterwards.
    """
    looping = [config for config in _configs(model) if getattr(config, _FIELD) == _LOOP]
    detect, checked = getattr(transformer, _DETECT, None), Distribution._validate_args
    try:
        for config in looping:
            setattr(config, _FIELD, _GROUPED)
        Distribution.set_default_validate_args(False)
        if detect is not None:
            setattr(transformer, _DETECT, lambda mask, is_causal=None, size=None: is_causal is True)
        yield
    finally:
        for config in looping:
            setattr(config, _FIELD, _LOOP)
        Distribution.set_default_validate_args(checked)
        if detect is not None:
            setattr(transformer, _DETECT, detect)


def runs_other_kernels(model: nn.Module) -> bool:
    """Whether the model makes other calls where it is `capturable`."""
    return any(getattr(config, _FIELD) == _LOOP for config in _configs(model))


@contextmanager
def without_fast_path() -> Iterator[None]:
    """Inside, PyTorch's transformer layers compute by ordinary operations; restored afterwards.

    Their fast path, which evaluation mode takes, runs no hooks, knows no capture, and returns zeros at padded
    positions where the ordinary operations return something else.
    """
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def fast_path_note(model: nn.Module) -> str:
    """What a captured program does not do that the model's fast path does; empty if there is nothing."""
    encoders = [m for m in model.modules() if isinstance(m, nn.TransformerEncoder)]
    if not any(encoder.use_nested_tensor for encoder in encoders):
        return ""
    return (
        "at positions that src_key_padding_mask hides, nn.TransformerEncoder in evaluation mode may return "
        "zeros; the program computes them, as with torch.backends.mha.set_fastpath_enabled(False)."
    )


def _configs(model: nn.Module) -> list[Any]:
    """The configurations in which a model or its parts name a kernel for experts, each once."""
    found = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    return [config for config in found.values() if getattr(config, _FIELD, None) is not None]
