"""Which rule handles which operator."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from secateur.graph.rules.op import Op, Value

Rule = Callable[[Op], Value]
"""A rule says which labels of an operator's inputs and outputs are the same, and returns the output's."""

RULES: dict[str, Rule] = {}
"""Operator name, as ``aten.conv2d.default``, -> its rule. Filled when `secateur.graph.rules` is imported."""


def rule(*operators: str) -> Callable[[Rule], Rule]:
    """Register a function as the rule of these operators (``aten.`` overloads by full name)."""

    def register(function: Rule) -> Rule:
        for name in operators:
            if name in RULES:
                raise ValueError(f"rule({name!r}): expected one rule an operator, got a second, {function.__name__}.")
            RULES[name] = function
        return function

    return register


def find_rule(node: fx.Node) -> Rule | None:
    """The rule of a node's operator; any operator that ATen tags as pointwise has the elementwise one."""
    name = operator_name(node)
    found = RULES.get(name)
    if found is None and torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return RULES["pointwise"]
    return found


def operator_name(node: fx.Node) -> str:
    """``aten.conv2d.default``, or ``operator.getitem`` for a Python function."""
    if isinstance(node.target, torch._ops.OpOverload | torch._ops.HigherOrderOperator):
        return str(node.target)
    return f"{getattr(node.target, '__module__', '')}.{getattr(node.target, '__name__', node.target)}".lstrip("_")
