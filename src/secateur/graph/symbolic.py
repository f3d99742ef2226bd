"""Let a capture go on where Python asks for numbers that a capture does not have.

``len(tensor)``, ``int(tensor)`` and ``float(tensor)`` give symbols. Conditions on values of tensors get given
answers.
"""

from __future__ import annotations

import builtins
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.fx.experimental.sym_node import SymNode
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.overrides import TorchFunctionMode

from secateur.common.preserving import is_own
from secateur.graph.writes import READ


@contextmanager
def lengths_open() -> Iterator[None]:
    """Inside, ``len(tensor)`` is a symbol if the tensor's first size is one.

    Python's own `len` returns an integer, which would fix the size.
    """
    original = builtins.len
    plain = (list, tuple, dict, str)  # a capture asks for the length of millions of these

    def length(value: Any, /) -> Any:
        if type(value) in plain:
            return original(value)
        size = value.shape[0] if isinstance(value, torch.Tensor) and value.ndim else None
        return size if isinstance(size, torch.SymInt) else original(value)

    builtins.len = length
    try:
        yield
    finally:
        builtins.len = original


class _NumberMeta(type):
    """The metaclass of a class that stands in for its base, `int` or `float`, in the user's code."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        plain, value = cls.__base__, args[0] if len(args) == 1 else None
        if isinstance(value, torch.SymInt if plain is int else torch.SymFloat):
            return value
        if isinstance(value, torch.Tensor) and value.dtype.is_floating_point is (plain is float):
            return value.item()
        return plain(*args, **kwargs)  # type: ignore[misc]

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, cls.__base__)  # type: ignore[arg-type]

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, cls.__base__)  # type: ignore[arg-type]


class _Integer(int, metaclass=_NumberMeta):
    """Replaces `int` in the user's modules."""


class _Float(float, metaclass=_NumberMeta):
    """Replaces `float` in the user's modules."""


@contextmanager
def numbers_open() -> Iterator[None]:
    """Inside, ``int(tensor)`` means ``tensor.item()`` in the user's code and in libraries of models.

    A capture gives a symbol for ``item``, where Python's own `int` has to return a number. An example is
    ``int(batch.max()) + 1``, which counts the graphs in a batch. ``float(tensor)`` is treated alike. Inside,
    ``type(x) is int`` is never true, so this is used only where a first attempt failed.
    """
    own = [vars(module) for name, module in list(sys.modules.items()) if is_own(name)]
    types = {"int": _Integer, "float": _Float}
    added = [(variables, name) for variables in own for name in types if name not in variables]
    try:
        for variables, name in added:
            variables[name] = types[name]
        yield
    finally:
        for variables, name in added:
            variables.pop(name, None)


_PASSED_ON = ("sym_node.py", "proxy_tensor.py", "non_strict_utils.py", "assertions.py", "symbolic.py")
"""Files whose code passes a condition of the user's code on, as ``torch/__init__.py`` does."""

MOST = 128
"""The most conditions that one capture answers: a loop might never end."""

Line = tuple[str, int]
"""A line of code: the file and the number."""


@dataclass
class Answers:
    """The answers to conditions on values of tensors during a capture.

    Attributes:
        default: The answer to all conditions but those at `inverted` lines.
        inverted: Lines whose conditions get the other answer.
        asked: The lines whose conditions were answered so far.
        numbers: Whether the code made numbers of Python from tensors. Their comparisons are answered too.
    """

    default: bool
    inverted: frozenset[Line] = frozenset()
    asked: set[Line] = field(default_factory=set)
    numbers: bool = False

    @contextmanager
    def given(self) -> Iterator[None]:
        """Inside, a capture gives these answers, since it has no values."""
        original, left = SymNode.guard_bool, MOST

        def guard_bool(node: Any, file: str, number: int) -> bool:
            nonlocal left
            try:
                return bool(original(node, file, number))
            except GuardOnDataDependentSymNode:
                left -= 1
                line = _users_line(sys._getframe(1))
                if line is None or left < 0:
                    raise
                self.asked.add(line)
                return self.default is not (line in self.inverted)

        SymNode.guard_bool = guard_bool  # type: ignore[assignment, method-assign]
        try:
            with _Marking(self):
                yield
        finally:
            SymNode.guard_bool = original  # type: ignore[method-assign]


class _Marking(TorchFunctionMode):
    """Inside, a capture marks tensors whose values Python code reads, so that they do not look unused."""

    def __init__(self, answers: Answers) -> None:
        super().__init__()
        self._answers = answers

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _READING and args and isinstance(args[0], torch.Tensor):
            READ(args[0])
            self._answers.numbers |= name != "__bool__"
        return func(*args, **(kwargs or {}))


_READING = frozenset("__bool__ __int__ __float__ __index__ item tolist is_nonzero nonzero argwhere".split())
"""Names of functions that make numbers of Python from a tensor, or sizes from its values."""


def _users_line(frame: FrameType | None) -> Line | None:
    """Return the line of the user's code with a condition; None if an operator of PyTorch asks for a size."""
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        is_library = _TORCH in file.parents or file.parent == Path(__file__).parent
        if not (is_library and file.name in _PASSED_ON) and file != _TORCH / "__init__.py":
            return None if is_library else (str(file), frame.f_lineno)
        frame = frame.f_back
    return None


_TORCH = Path(torch.__file__).parent
