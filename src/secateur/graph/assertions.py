"""Checks of values inside a forward pass: a capture assumes that they pass.

``assert not x.isnan().any()`` and ``if (n < 0).any(): raise ...`` branch on the values of a tensor. A capture
has no values. But the code after such a check runs only if the check passed, so its outcome is known.
"""

from __future__ import annotations

import ast
import linecache
import sys
from types import CodeType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from secateur.graph.answering import asking

_REPORTS = ("print", "warnings", "logging", "logger", "log")


class AssertionsHold(TorchFunctionMode):
    """Inside, a tensor that an assertion turns into a bool gives the value with which the model goes on."""

    def __init__(self) -> None:
        super().__init__()
        self._wanted: dict[tuple[CodeType, int], bool | None] = {}  # by line: see `_wanted`

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer ``bool(tensor)`` in an assertion; run anything else as it is."""
        if func is torch.Tensor.__bool__:
            frame = asking(sys._getframe(1))
            if frame is not None:
                line = frame.f_code, frame.f_lineno
                if line not in self._wanted:
                    self._wanted[line] = _wanted(*line)
                if (wanted := self._wanted[line]) is not None:
                    return wanted
        return func(*args, **(kwargs or {}))


def _wanted(code: CodeType, line: int) -> bool | None:
    """Return the value with which the code goes on after a line; None if that is no assertion, or unclear."""
    try:
        tree = ast.parse("".join(linecache.getlines(code.co_filename)))
    except SyntaxError:
        return None
    for node in ast.walk(tree):
        if not isinstance(node, ast.Assert | ast.If):
            continue
        if node.test.lineno <= line <= (node.test.end_lineno or line):
            if isinstance(node, ast.If) and not _only_stops(node):
                return None
            answers = set(_answers(node.test, isinstance(node, ast.Assert)))
            return answers.pop() if len(answers) == 1 else None
    return None


def _only_stops(branch: ast.If) -> bool:
    """Whether a branch only raises, or only prints, warns or logs."""
    if branch.orelse:
        return False
    return isinstance(branch.body[-1], ast.Raise) or all(
        isinstance(step, ast.Expr) and isinstance(step.value, ast.Call) and _root(step.value.func) in _REPORTS
        for step in branch.body
    )


def _root(called: ast.expr) -> str:
    while isinstance(called, ast.Attribute):
        called = called.value
    return called.id if isinstance(called, ast.Name) else ""


def _answers(test: ast.expr, wanted: bool) -> list[bool | None]:
    """Return the value that each part of a condition has if the whole has the value `wanted`.

    It is None for a part with conditions inside.
    """
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return _answers(test.operand, not wanted)
    if isinstance(test, ast.BoolOp):
        return [answer for part in test.values for answer in _answers(part, wanted)]
    conditions = (ast.BoolOp, ast.IfExp, ast.Lambda, ast.comprehension, ast.Not)
    return [None if any(isinstance(node, conditions) for node in ast.walk(test)) else wanted]
