"""Ordinary forward passes in which all conditions on values of tensors get one answer."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from types import FrameType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from secateur.common.preserving import is_own

MOST = 1000
"""The most conditions of one pass: a loop might never end."""


class Answering(TorchFunctionMode):
    """Inside, ``bool(tensor)`` in the user's code is always True, or always False, or what the values say.

    Attributes:
        given: The answers so far.
    """

    def __init__(self, answer: bool | None) -> None:
        """Set the answer; None: what the values say."""
        super().__init__()
        self.given = set[bool]()
        self._answer, self._left = answer, MOST

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer a condition; run anything else as it is."""
        if func is torch.Tensor.__bool__ and _is_users(asking(sys._getframe(1))):
            self._left -= 1
            if self._left < 0:
                raise RecursionError(f"more than {MOST} conditions")
            answer = bool(func(*args)) if self._answer is None else self._answer
            self.given.add(answer)
            return answer
        return func(*args, **(kwargs or {}))


def _is_users(frame: FrameType | None) -> bool:
    """Whether a frame runs code of the user, or of a library of models."""
    return frame is not None and is_own(frame.f_globals.get("__name__"))


def answering(answer: bool | None) -> AbstractContextManager[object]:
    """Inside, conditions on values of tensors have this answer; None: what the values say."""
    return nullcontext() if answer is None else Answering(answer)


def asking(frame: FrameType | None) -> FrameType | None:
    """Return the frame that asks for ``bool(tensor)``: the first, going outwards, of no function mode."""
    while frame is not None and frame.f_code.co_name in ("__torch_function__", "wrapped", "__bool__"):
        frame = frame.f_back
    return frame
