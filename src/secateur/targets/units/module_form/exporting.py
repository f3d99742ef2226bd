"""Running a model as `torch.export` runs it: code may ask whether it does, and go another way."""

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
def exporting(on: bool, asked: set[str]) -> Iterator[None]:
    """Inside, code that asks whether it is exported or compiled is told so, if `on`, and noted in `asked`.

    Transformers then gives attention a mask where else it gives none. PyTorch's own code, and other threads,
    get true answers.
    """
    own = threading.get_ident()
    before = {name: found for name in _QUESTIONS if (found := getattr(torch.compiler, name, None))}

    def answering(name: str, original: Callable[[], bool]) -> Callable[[], bool]:
        def answer() -> bool:
            if threading.get_ident() != own or in_pytorch(sys._getframe(1)):
                return original()
            asked.add(name)
            return on or original()

        return answer

    try:
        for name, original in before.items():
            setattr(torch.compiler, name, answering(name, original))
        yield
    finally:
        for name, original in before.items():
            setattr(torch.compiler, name, original)
