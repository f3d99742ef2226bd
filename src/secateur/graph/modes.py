"""Modes of PyTorch in which a model may run other code: without gradients, in autocast, in another dtype."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils import _pytree as pytree

from secateur.common.mapped import is_mapped
from secateur.common.models import device_of
from secateur.graph.frames import in_pytorch
from secateur.graph.inputs import Arguments

LARGEST = 100_000_000
"""A model with more parameters is not converted to other dtypes: each copy would take much memory."""


class Mode(NamedTuple):
    """How PyTorch runs a model.

    Attributes:
        gradients: Whether gradients are on.
        autocast: Whether `torch.autocast` with bfloat16 is on.
        dtype: The dtype of all floats of the model and its inputs. None leaves them as they are.
    """

    gradients: bool = True
    autocast: bool = False
    dtype: torch.dtype | None = None

    def __str__(self) -> str:
        parts = [str(self.dtype or "").removeprefix("torch."), "autocast" if self.autocast else ""]
        return " ".join(filter(None, parts)) or f"gradients={self.gradients}"

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        """Inside, PyTorch is in this mode, and the model has its dtype."""
        device = device_of(model).type
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(self.gradients))
            if self.autocast:
                stack.enter_context(torch.autocast(device, torch.bfloat16))
            if self.dtype is not None:
                stack.enter_context(_converted(model, self.dtype))
            yield

    def cast(self, arguments: Arguments) -> Arguments:
        """Convert the floats among the arguments of a call."""
        dtype = self.dtype
        if dtype is None:
            return arguments
        found: Arguments = pytree.tree_map_only(
            torch.Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, arguments
        )
        return found


PLAIN = Mode()
WITHOUT_GRADIENTS = Mode(gradients=False)

_BY_QUESTION = {
    "requires_grad": [WITHOUT_GRADIENTS],
    "is_grad_enabled": [WITHOUT_GRADIENTS],
    "is_autocast": [Mode(autocast=True)],
    "autocast_dtype": [Mode(autocast=True)],
    "dtype": [
        Mode(autocast=True),
        *(Mode(dtype=dtype) for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.float32)),
    ],
}
"""What code asks for -> the modes in which it may get another answer."""


def asked_modes(questions: set[str], model: nn.Module) -> list[Mode]:
    """Return the modes that may change what code does.

    Args:
        questions: Names of functions and attributes by which the code asks for the mode; see `questions`.
        model: The model, for its dtype. Large models are not tried in others.
    """
    asked = [
        mode
        for part, modes in _BY_QUESTION.items()
        if any(part in question for question in questions)
        for mode in modes
    ]
    tensors = list(itertools.chain(model.parameters(), model.buffers()))
    own = {t.dtype for t in tensors if t.is_floating_point()}
    fixed = sum(t.numel() for t in tensors) > LARGEST or any(t.is_meta or is_mapped(t) for t in tensors)
    return [
        mode
        for mode in dict.fromkeys(asked)
        if not (fixed and (mode.dtype or mode.autocast)) and own != {mode.dtype}
    ]


@contextmanager
def questions(found: set[str]) -> Iterator[None]:
    """Inside, calls of the user's code that ask for PyTorch's mode are noted, by a profiler.

    Attributes of tensors are no such calls; see `secateur.graph.executionpath.ExecutionPath`.
    """

    def note(frame: FrameType, event: str, called: Any) -> None:
        if event == "c_call":
            name = getattr(called, "__name__", "")
            if ("is_grad_enabled" in name or "autocast" in name) and not in_pytorch(frame):
                found.add(name)

    with profiled(note):
        yield


@contextmanager
def profiled(note: Callable[[FrameType, str, Any], None]) -> Iterator[None]:
    """Inside, Python informs `note` of each call, as `sys.setprofile` says."""
    before = sys.getprofile()
    sys.setprofile(note)
    try:
        yield
    finally:
        sys.setprofile(None)
        if before is None or callable(before):
            sys.setprofile(before)
        else:  # `cProfile` up to Python 3.11, which `sys.setprofile` does not take back
            before.enable()


@contextmanager
def _converted(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Inside, parameters and buffers with floats have another dtype. They stay the same objects."""
    tensors = {
        id(t): t for t in itertools.chain(model.parameters(), model.buffers()) if t.is_floating_point()
    }
    before = [(tensor, tensor.data) for tensor in tensors.values()]
    try:
        for tensor, data in before:
            tensor.data = data.to(dtype)
        yield
    finally:
        for tensor, data in before:
            tensor.data = data
