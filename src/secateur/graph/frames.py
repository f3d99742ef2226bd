"""The user's code: which line of it runs, and the functions in it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FrameType

import torch

LIBRARY = str(Path(torch.__file__).parent)
"""The folder of PyTorch."""

Line = tuple[str, int]
"""A line of code: the file and the number."""


def in_pytorch(frame: FrameType) -> bool:
    """Whether a frame runs code of PyTorch itself."""
    return frame.f_code.co_filename.startswith(LIBRARY)


def line_of_user(frame: FrameType | None) -> Line:
    """Return the innermost running line outside PyTorch, from a frame outwards."""
    while frame is not None and in_pytorch(frame):
        frame = frame.f_back
    return ("", 0) if frame is None else (frame.f_code.co_filename, frame.f_lineno)


def codes_in(code: CodeType) -> Iterator[CodeType]:
    """Yield the code of a function, and of the functions that are defined in it."""
    yield code
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from codes_in(inner)
