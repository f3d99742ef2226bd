"""Which way a forward pass goes: the calls it makes, and how its comparisons of sizes come out."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from secateur.graph.inputs import OpenAxis

_LIBRARY = str(Path(torch.__file__).parent)

FARTHEST = 16
"""So many times longer an axis may get to see what a forward pass does there."""
TRIES = 6
"""Most sizes of one axis that are tried beside the first two."""

Line = tuple[str, int]
"""File and number of a line."""


Asked = tuple[tuple[str, Line, tuple[int, ...]], ...]
"""Calls: of each its name, its line, and numbers that it took."""


class Course(TorchFunctionMode):
    """What a forward pass does while this is active.

    Attributes:
        calls: Of each call of a torch function its name, its line, the numbers it took, and the shapes of
            what it returned. What PyTorch's own modules call is one call without a name: some do more in
            training mode, and mean the same.
        compared: By line, the comparisons of a size with a number: size, number, outcome.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, Line, tuple[Any, ...]]] = []
        self.compared: dict[Line, list[tuple[int, int, bool]]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the call and write it down; sizes that it returns are watched."""
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in ("__get__", "size"):
            return self._watched(result)
        frame = sys._getframe(1)
        if frame.f_code.co_filename.startswith(_LIBRARY):
            call: tuple[str, Line, tuple[Any, ...]] = ("", _line(frame), ())
            self.calls += [call] if self.calls[-1:] != [call] else []
            return result
        numbers = [v for v in pytree.tree_leaves((args, kwargs)) if type(v) in (int, _Size)]
        shapes = [v.shape for v in pytree.tree_leaves(result) if isinstance(v, torch.Tensor)]
        self.calls.append((name, _line(frame), (*numbers, *shapes)))
        return result

    def _watched(self, value: Any) -> Any:
        if isinstance(value, torch.Size):
            return torch.Size([_Size.of(v, self) for v in value])
        return _Size.of(value, self) if type(value) is int else value

    @property
    def fixed(self) -> Asked:
        """The calls in order, with the numbers that are no sizes."""
        return tuple((name, line, tuple(n for n in ns if type(n) is int)) for name, line, ns in self.calls)

    @property
    def asked(self) -> Asked:
        """The calls in order, with all numbers, but without the shapes of what they returned."""
        return tuple(
            (name, line, tuple(int(n) for n in ns if isinstance(n, int))) for name, line, ns in self.calls
        )

    @property
    def lines(self) -> frozenset[tuple[str, Line]]:
        """The calls without numbers and shapes, each once: a loop may run more often for longer inputs."""
        return frozenset((name, line) for name, line, _ in self.calls)


class _Size(int):
    """A size of a tensor, or what was computed from some; its comparisons in the user's code are noted."""

    course: Course

    @classmethod
    def of(cls, value: int, course: Course) -> _Size:
        new = cls(value)
        new.course = course
        return new

    def __bool__(self) -> bool:
        self.note(0, outcome=int(self) != 0)
        return int(self) != 0

    def note(self, other: Any, *, outcome: bool) -> None:
        frame = sys._getframe(2)
        if isinstance(other, int) and not frame.f_code.co_filename.startswith(_LIBRARY):
            found = self.course.compared.setdefault(_line(frame), [])
            found.append((int(self), int(other), outcome))


def _comparison(name: str) -> Callable[[_Size, Any], Any]:
    plain = getattr(int, name)

    def compare(self: _Size, other: Any) -> Any:
        outcome = plain(self, other)
        if isinstance(outcome, bool):
            self.note(other, outcome=outcome)
        return outcome

    return compare


def _computed(name: str) -> Callable[[_Size, Any], Any]:
    plain = getattr(int, name)

    def compute(self: _Size, other: Any) -> Any:
        value = plain(self, other)
        return _Size.of(value, self.course) if type(value) is int else value

    return compute


for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(_Size, f"__{_name}__", _comparison(f"__{_name}__"))
for _name in ("add", "sub", "mul", "floordiv", "mod"):
    for _side in (f"__{_name}__", f"__r{_name}__"):
        setattr(_Size, _side, _computed(_side))
_Size.__hash__ = int.__hash__  # type: ignore[method-assign]


def _line(frame: FrameType | None) -> Line:
    """The innermost line outside of PyTorch."""
    while frame is not None and frame.f_code.co_filename.startswith(_LIBRARY):
        frame = frame.f_back
    return ("", 0) if frame is None else (frame.f_code.co_filename, frame.f_lineno)


def other_courses(
    axis: OpenAxis,
    traced: Course,
    course_at: Callable[[int], Course | None],
    shared: set[Asked],
) -> list[int]:
    """Sizes of an axis at which the forward pass calls other lines than at the traced size.

    Its comparisons of sizes say where to look: a size that is compared with a number is brought to either
    side of it. What no comparison shows, a table that ends somewhere, is found by nobody.

    Args:
        axis: An axis that may vary.
        traced: What happened at the traced size.
        course_at: What happens at another size; None where the model does not run.
        shared: What the forward pass asked for at the sizes that were found for other axes: the same need
            not be found twice. What is found is added.
    """
    known, found = {traced.lines}, []
    for size in _candidates(axis, traced.compared.values()):
        course = course_at(size)
        if course is not None and course.lines not in known:
            known.add(course.lines)
            if course.fixed not in shared:
                shared.add(course.fixed)
                found.append(size)
    return found


def _candidates(axis: OpenAxis, compared: Iterable[list[tuple[int, int, bool]]]) -> list[int]:
    """The second size, and those at which comparisons may come out otherwise, the nearest first."""
    found = {1} if axis.batch else set()  # `len` gives Python's own integers, and code asks for one sample so
    for comparisons in compared:
        if len({outcome for _, _, outcome in comparisons}) == 1:
            for size, number, _ in comparisons:
                steps = (-1, 0, 1) if size > 0 else ()
                found |= {math.ceil(axis.size * max(number + step, 0) / size) for step in steps}
    near = sorted(found - {axis.size, axis.other}, key=lambda n: abs(n - axis.size))
    return [axis.other, *(n for n in near if 1 <= n <= FARTHEST * axis.size)][: TRIES + 1]
