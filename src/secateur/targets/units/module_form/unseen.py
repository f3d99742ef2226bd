"""Lines of a model's code that did not run at trace, and that contain a size which has shrunk."""

from __future__ import annotations

import contextlib
import dis
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import CodeType, FunctionType
from typing import Any

from torch import nn

from secateur.errors import ApplyError
from secateur.graph.frames import codes_in
from secateur.plan import Plan
from secateur.targets.units.module_form.attributes import follows
from secateur.targets.units.module_form.calls import FAMILIES
from secateur.targets.units.module_form.mended import Code, Rule
from secateur.targets.units.module_form.recording import written
from secateur.targets.units.tensors import removed_positions, tensor_called

_SMALLEST = 4
"""Smaller sizes are not searched for, since code contains such numbers for many reasons."""


SizedLines = Callable[[CodeType], Mapping[int, frozenset[int]]]
"""A function that returns the lines of code that may use a size, by number, with their integers."""


def known_code(
    dense: nn.Module, small: nn.Module, plan: Plan, rules: Mapping[str, Sequence[Rule]]
) -> dict[str, Code]:
    """Return, for each module of the smaller model, the rules for its calls, and its lines without rules."""
    ran = {frame[:4] for found in rules.values() for rule in found for frame in rule.place}
    shrunk = {path: {n for rule in found for n in rule.passed} for path, found in rules.items()}
    for name, axes in removed_positions(plan).items():
        with contextlib.suppress(ApplyError):  # neither a parameter nor a buffer
            shape = tensor_called(dense, name).shape
            parts = name.split(".")
            for depth in range(len(parts)):
                shrunk.setdefault(".".join(parts[:depth]), set()).update(shape[axis] for axis in axes)
    sized = functools.cache(_sized_lines)  # equal layers share their code
    found = {}
    for path, module in small.named_modules():
        sizes = frozenset(size for size in shrunk.get(path, ()) if size >= _SMALLEST)
        unseen = (
            () if follows(module) or not sizes else tuple(_lines(type(module), sizes, ran, sized).items())
        )
        if path in rules or unseen:
            found[path] = Code(tuple(rules.get(path, ())), sizes, unseen)
    return found


def _lines(
    kind: type, sizes: frozenset[int], ran: set[tuple[Any, ...]], sized: SizedLines
) -> dict[str, tuple[str, ...]]:
    """Return, by method, the lines of a class that did not run and contain one of the sizes."""
    found: dict[str, tuple[str, ...]] = {}
    for name in dir(kind):
        method = inspect.getattr_static(kind, name, None)
        if not isinstance(method, FunctionType) or name.startswith("__"):
            continue
        for code in _codes(inspect.unwrap(method)):
            where = (code.co_filename, code.co_name, code.co_firstlineno)
            for line, numbers in sized(code).items():
                if numbers & sizes and (*where, line) not in ran:
                    file = code.co_filename.replace("\\", "/").rsplit("/", 1)[-1]
                    found[name] = (*found.get(name, ()), f"{file}, {code.co_name} (line {line})")
    return found


def _codes(function: object) -> Iterator[CodeType]:
    """Yield the code of a function and of functions inside it, except PyTorch's own."""
    code = getattr(function, "__code__", None)
    if code is not None and not str(getattr(function, "__module__", "")).startswith(("torch.", "secateur.")):
        yield from codes_in(code)


def _sized_lines(code: CodeType) -> dict[int, frozenset[int]]:
    """Return the lines of a function that index or call a function with sizes, with their integers."""
    starts = dict(dis.findlinestarts(code))
    sized: set[int] = set()
    numbers: dict[int, set[int]] = {}
    line = code.co_firstlineno
    for instruction in dis.get_instructions(code):
        line = starts.get(instruction.offset) or line
        numbers.setdefault(line, set()).update(written(instruction))
        index = "SUBSCR" in instruction.opname or "SLICE" in instruction.opname or instruction.argrepr == "[]"
        if index or (isinstance(instruction.argval, str) and instruction.argval in FAMILIES):
            sized.add(line)
    return {line: frozenset(numbers[line]) for line in sized if numbers[line]}


def in_words(codes: Iterable[Code]) -> str:
    """Write a sentence on the lines that did not run; empty if there are none."""
    lines = list(dict.fromkeys(line for code in codes for _, method in code.unseen for line in method))
    if not lines:
        return ""
    more = f" and {len(lines) - 3} more" if len(lines) > 3 else ""
    return (
        f"lines that hold a size which has shrunk and did not run at trace, so they are refused if they run: "
        f"{'; '.join(lines[:3])}{more}."
    )
