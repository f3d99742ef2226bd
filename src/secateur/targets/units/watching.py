"""What a forward pass does that no captured program can hold: seen by running the dense model."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any

import numpy as np
import torch
from torch import nn

from secateur.calibration.randomness import seeded
from secateur.common.foreign import running_line
from secateur.common.models import evaluating
from secateur.common.outputs import tensors_of
from secateur.errors import ApplyError
from secateur.graph.inputs import Arguments
from secateur.targets.units.compare import SAME, relative_difference

_HOOKS = {
    torch.Tensor.register_hook.__code__,
    torch.Tensor.register_post_accumulate_grad_hook.__code__,
}
_NODE_HOOKS = ("register_hook", "register_prehook")
"""Of the backward pass's own nodes, whose methods are not Python's."""
_SAVED: CodeType = torch.autograd.graph.saved_tensors_hooks.__init__.__code__


@dataclass
class Beside:
    """What a forward pass does beside running PyTorch's operators.

    Attributes:
        drawn: How it gets random numbers that are not PyTorch's, and where; empty if it does not.
        gradient: What changes the gradients of its operators, and where; empty if nothing does.
    """

    drawn: str = ""
    gradient: str = ""

    def refuse_draws(self) -> None:
        """Raise ApplyError if a captured program would hold one draw for ever."""
        if self.drawn:
            raise ApplyError(
                f"apply: expected a forward pass whose random numbers are PyTorch's, but {self.drawn}: a "
                f"captured program would hold one draw for ever. Take form 'module', or draw with torch.rand."
            )


def beside(model: nn.Module, arguments: Arguments, *, training: bool = False) -> Beside:
    """Run a model twice, with other seeds for all but PyTorch's random numbers, and watch it.

    Args:
        model: The dense model; it is left as it was.
        arguments: What it is called with.
        training: Whether it runs in training mode.

    Returns:
        What was seen before the model failed, if it does.
    """
    args, kwargs = arguments
    found = Beside(gradient=_hooked(model))
    outputs: list[list[torch.Tensor]] = []
    drew: list[_Drew] = []
    for seed in (1, 2):
        drew.append({})
        with evaluating(model, training=training), torch.enable_grad(), seeded(0):
            random.seed(seed)
            np.random.seed(seed)  # noqa: NPY002 what the model draws from
            before = _numpy_state()
            try:
                with _watching(found, drew[-1]):
                    outputs.append([t.detach() for t in tensors_of(model(*args, **kwargs))])
            except Exception:  # the user's forward may fail in any way; a capture says how
                return found
            if _numpy_state() != before:
                drew[-1]["numpy"] = _numpy_state(), ""
            if id(_PYTHON) in drew[-1]:
                drew[-1][id(_PYTHON)] = _PYTHON.getstate(), drew[-1][id(_PYTHON)][1]
    found.drawn = _drawn(*drew)
    if not found.drawn and not any(t.is_meta for t in outputs[0]):
        tolerance = max((SAME.get(t.dtype, 1e-3) for t in outputs[0]), default=0.0)
        if not relative_difference(*outputs) <= tolerance:
            found.drawn = "it gives another output at each call, though PyTorch's random numbers are the same"
    return found


_PYTHON: random.Random = random.random.__self__  # type: ignore[attr-defined]
"""The generator that all of Python shares."""

_Drew = dict[int | str, tuple[Any, str]]
"""Generators that were used, and the line that did: by identity. Of shared ones, their last state instead."""


def _drawn(first: _Drew, second: _Drew) -> str:
    """What both runs drew from. A generator that forward makes or seeds itself gives the same each time."""
    for key, (held, line) in first.items():
        if key in second:
            shared = key in ("numpy", id(_PYTHON))
            if not shared or second[key][0] != held:
                return f"it draws random numbers from {'NumPy' if key == 'numpy' else 'Python'}{line}"
    return ""


def _numpy_state() -> tuple[Any, ...]:
    """The state of the generator that all of NumPy shares, whose functions tell no profiler of a call."""
    kind, numbers, *rest = np.random.get_state()  # noqa: NPY002
    return kind, np.asarray(numbers).tobytes(), *rest


def _hooked(model: nn.Module) -> str:
    """The first parameter with a hook on its gradient."""
    for name, parameter in model.named_parameters():
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            return f"a hook changes the gradient of {name}"
    return ""


@contextmanager
def _watching(found: Beside, drew: _Drew) -> Iterator[None]:
    """Note what runs in the block. Python tells a profiler of each call."""

    def note(frame: FrameType, event: str, called: Any) -> None:
        generator = getattr(called, "__self__", None) if event == "c_call" else None
        if isinstance(generator, random.Random) and id(generator) not in drew:
            drew[id(generator)] = generator, _at(frame)
        elif not found.gradient and (what := _changes_gradient(frame, event, called)):
            found.gradient = what + _at(frame)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        yield
    finally:
        sys.setprofile(before)


def _changes_gradient(frame: FrameType, event: str, called: Any) -> str:
    """What a call does to gradients. PyTorch's own functions, such as checkpointing, keep them."""
    if event == "c_call":
        name, owner = getattr(called, "__name__", ""), getattr(called, "__self__", None)
        if name == "apply" and isinstance(owner, type) and issubclass(owner, torch.autograd.Function):
            return f"{owner.__qualname__} has a backward pass of its own" if _is_own(owner) else ""
        return "a hook changes gradients" if name in _NODE_HOOKS else ""
    if event != "call":
        return ""
    code = frame.f_code
    if code in _HOOKS:
        return "a hook changes gradients"
    if code is _SAVED and _is_own(frame.f_locals["pack_hook"]):
        return "a hook changes what the backward pass reads"
    return ""


def _is_own(made: Any) -> bool:
    return not str(made.__module__).startswith("torch.")


def _at(frame: FrameType) -> str:
    """The innermost line of the user's code, in brackets; empty if there is none."""
    return f" ({line})" if (line := running_line(frame)) else ""
