"""What a forward pass of the dense model does that no captured program can do, such as draws from NumPy."""

from __future__ import annotations

import random
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
from secateur.graph.modes import profiled
from secateur.targets.units.compare import relative_difference, rounding_of

_HOOKS = {
    torch.Tensor.register_hook.__code__,
    torch.Tensor.register_post_accumulate_grad_hook.__code__,
}
_NODE_HOOKS = ("register_hook", "register_prehook")
"""Methods by which hooks are added to nodes of the backward pass. They are not Python functions."""
_SAVED: CodeType = torch.autograd.graph.saved_tensors_hooks.__init__.__code__


@dataclass
class SideEffects:
    """What a forward pass does beyond running PyTorch's operators.

    Attributes:
        drawn: How it draws random numbers that are not PyTorch's, and where; empty if it draws none.
        gradient: What changes the gradients of its operators, and where; empty if nothing does.
        kept: What it keeps from call to call outside of its buffers, and computes with; empty if nothing.
    """

    drawn: str = ""
    gradient: str = ""
    kept: str = ""

    def refuse(self) -> None:
        """Refuse a model of which a captured program would repeat what should change from call to call.

        Raises:
            ApplyError: The model draws random numbers that are not PyTorch's, or computes with what earlier
                calls left in attributes.
        """
        if self.drawn:
            raise ApplyError(
                f"apply: expected a forward pass whose random numbers are PyTorch's, but {self.drawn}: a "
                f"captured program would repeat one draw. Take form 'module', or draw with torch.rand."
            )
        if self.kept:
            raise ApplyError(
                f"apply: expected a forward pass that computes with its inputs, parameters and buffers, but "
                f"{self.kept}: a captured program keeps nothing. Take form 'module', or keep it in a buffer."
            )


def side_effects_of(model: nn.Module, arguments: Arguments, *, training: bool = False) -> SideEffects:
    """Watch a model run twice: with the same seed for PyTorch, and other seeds for other random numbers.

    Args:
        model: The dense model; it is left as it was.
        arguments: The arguments of the call.
        training: Whether the model runs in training mode.

    Returns:
        What was observed; if the model fails, what was observed before.
    """
    args, kwargs = arguments
    found = SideEffects(gradient=_hooked(model))
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
            except Exception:  # the user's forward may fail in any way; a capture reports it
                return found
            if _numpy_state() != before:
                drew[-1]["numpy"] = _numpy_state(), ""
            if id(_PYTHON) in drew[-1]:
                drew[-1][id(_PYTHON)] = _PYTHON.getstate(), drew[-1][id(_PYTHON)][1]
    found.drawn = _drawn(*drew)
    if not found.drawn and not any(t.is_meta for t in outputs[0]):
        if not _same(*outputs):
            found.drawn = "it gives another output at each call, though PyTorch's random numbers are the same"
        else:
            found.kept = _kept(model, arguments, training=training)
    return found


def _same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    tolerance = rounding_of(first)
    return relative_difference(first, second) <= tolerance


def _kept(model: nn.Module, arguments: Arguments, *, training: bool) -> str:
    """Say what a call leaves for the next one outside of buffers; empty if both give the same."""
    args, kwargs = arguments
    outputs: list[list[torch.Tensor]] = []
    with evaluating(model, training=training), torch.enable_grad():
        before, attributes = _Before(model, parameters=training), _attributes(model)
        try:
            for _ in range(2):
                before.put_back()
                with seeded(0):
                    outputs.append([t.detach() for t in tensors_of(model(*args, **kwargs))])
        except Exception as error:  # the user's forward may fail in any way
            return f"it fails at the second call ({type(error).__name__})" if outputs else ""
        new = [name for name, value in _attributes(model).items() if attributes.get(name) is not value]
    if _same(*outputs):
        return ""
    return f"it gives something else at the second call (it sets {', '.join(new[:3]) or 'no attribute'})"


def generators_of(model: nn.Module) -> Iterator[torch.Generator]:
    """Yield the generators of random numbers that a model, or its code, keeps between calls."""
    for module in model.modules():
        code = getattr(type(module).forward, "__globals__", {})
        yield from (v for v in (*vars(module).values(), *code.values()) if isinstance(v, torch.Generator))


class _Before:
    """What a captured program keeps from call to call as the model does: buffers, parameters, generators."""

    def __init__(self, model: nn.Module, *, parameters: bool) -> None:
        self._buffers = [(m, dict(m._buffers)) for m in model.modules()]
        tensors = [*model.buffers(), *(model.parameters() if parameters else ())]
        self._values = [(tensor.detach(), tensor.detach().clone()) for tensor in tensors]
        self._generators = [(generator, generator.get_state()) for generator in generators_of(model)]

    def put_back(self) -> None:
        for module, buffers in self._buffers:
            module._buffers.update(buffers)
        for tensor, value in self._values:
            tensor.copy_(value)
        for generator, state in self._generators:
            generator.set_state(state)


def _attributes(model: nn.Module) -> dict[str, Any]:
    """The attributes of all modules, by path: what a call may set."""
    return {
        f"{path}.{name}" if path else name: value
        for path, module in model.named_modules()
        for name, value in vars(module).items()
    }


_PYTHON: random.Random = random.random.__self__  # type: ignore[attr-defined]
"""The random generator that all Python code shares."""

_Drew = dict[int | str, tuple[Any, str]]
"""Identity of a generator that was used -> the generator (of a shared one, its last state), and the line."""


def _drawn(first: _Drew, second: _Drew) -> str:
    """Say from which generator both runs drew. One that forward itself makes or seeds does not count."""
    for key, (state, line) in first.items():
        if key in second:
            shared = key in ("numpy", id(_PYTHON))
            if not shared or second[key][0] != state:
                return f"it draws random numbers from {'NumPy' if key == 'numpy' else 'Python'}{line}"
    return ""


def _numpy_state() -> tuple[Any, ...]:
    """Return the state of NumPy's shared generator. A profiler does not see calls of its functions."""
    kind, numbers, *rest = np.random.get_state()  # noqa: NPY002
    return kind, np.asarray(numbers).tobytes(), *rest


def _hooked(model: nn.Module) -> str:
    """Name the first parameter with a hook on its gradient; empty if there is none."""
    for name, parameter in model.named_parameters():
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            return f"a hook changes the gradient of {name}"
    return ""


@contextmanager
def _watching(found: SideEffects, drew: _Drew) -> Iterator[None]:
    """Inside, calls are watched by a profiler, which Python informs of each call."""

    def note(frame: FrameType, event: str, called: Any) -> None:
        generator = getattr(called, "__self__", None) if event == "c_call" else None
        if isinstance(generator, random.Random) and id(generator) not in drew:
            drew[id(generator)] = generator, _at(frame)
        elif not found.gradient and (what := _changes_gradient(frame, event, called)):
            found.gradient = what + _at(frame)

    with profiled(note):
        yield


def _changes_gradient(frame: FrameType, event: str, called: Any) -> str:
    """Say how a call changes gradients; empty if not. PyTorch's own functions do not change them."""
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
    """Return the innermost line of the user's code, in brackets; empty if there is none."""
    return f" ({line})" if (line := running_line(frame)) else ""
