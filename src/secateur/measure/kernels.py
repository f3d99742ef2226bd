"""Choose the kernels that run the experts of Transformers and PyTorch's own transformer layers."""

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
_LOOP, _GROUPED, _BATCHED = "eager", "grouped_mm", "batched_mm"
_DETECT = "_detect_is_causal_mask"


def with_loop(model: M) -> M:
    """Make a copy of a Transformers model run its experts in a loop, and return the copy.

    The fast kernels do not support float64. Other models are not changed.
    """
    for config in _configs(model):
        setattr(config, _FIELD, _LOOP)
    return model


@contextmanager
def capturable(model: nn.Module) -> Iterator[None]:
    """Make a model easier to capture inside the block, without changing its results.

    Experts run as one product instead of a loop (a batched one in float64, which grouped products do not
    take): the loop runs over the experts that some token chose, so its length depends on the data, which a
    capture cannot hold. PyTorch's distributions do not check their arguments, and its transformers do not
    test whether a mask is causal, which only chooses a kernel. Everything is restored afterwards.
    """
    looping = [config for config in _configs(model) if getattr(config, _FIELD) == _LOOP]
    double = any(tensor.dtype == torch.float64 for tensor in model.parameters())
    detect, checked = getattr(transformer, _DETECT, None), Distribution._validate_args
    try:
        for config in looping:
            setattr(config, _FIELD, _BATCHED if double else _GROUPED)
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
    """Whether `capturable` changes the calls that a model makes."""
    return any(getattr(config, _FIELD) == _LOOP for config in _configs(model))


@contextmanager
def without_fast_path() -> Iterator[None]:
    """Turn off the fast path of PyTorch's transformer layers inside the block.

    The fast path of evaluation mode runs no hooks, cannot be captured, and returns zeros at padded positions,
    where ordinary operations return something else.
    """
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def fast_path_note(model: nn.Module) -> str:
    """Say how a captured program differs from the model's fast path; empty if it does not."""
    encoders = [m for m in model.modules() if isinstance(m, nn.TransformerEncoder)]
    if not any(encoder.use_nested_tensor for encoder in encoders):
        return ""
    return (
        "at positions that src_key_padding_mask hides, nn.TransformerEncoder in evaluation mode may return "
        "zeros; the program computes them, as with torch.backends.mha.set_fastpath_enabled(False)."
    )


def _configs(model: nn.Module) -> list[Any]:
    """Return the configurations of a model and its parts that name a kernel for experts, each once."""
    found = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    return [config for config in found.values() if getattr(config, _FIELD, None) is not None]
