"""Running a model as `torch.export` runs it, since code may ask for that and do something else then."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from secateur.graph.frames import in_pytorch

_QUESTIONS = ("is_exporting", "is_compiling")
"""Functions of `torch.compiler` by which code asks."""


@contextmanager
def exporting(answer: bool | None, asked: set[str]) -> Iterator[None]:
    """Inside, code that asks whether it is exported or compiled gets this answer; the true one if None.

    The names of the functions by which it asks are added to `asked`. Transformers passes a mask to attention
    then, where it otherwise passes none. PyTorch's own code, and other threads, get true answers.
    """
    own = threading.get_ident()
    before = {name: found for name in _QUESTIONS if (found := getattr(torch.compiler, name, None))}

    def answering(name: str, original: Callable[[], bool]) -> Callable[[], bool]:
        def asks() -> bool:
            if threading.get_ident() != own or in_pytorch(sys._getframe(1)):
                return original()
            asked.add(name)
            return original() if answer is None else answer

        return asks

    try:
        for name, original in before.items():
            setattr(torch.compiler, name, answering(name, original))
        yield
    finally:
        for name, original in before.items():
            setattr(torch.compiler, name, original)
