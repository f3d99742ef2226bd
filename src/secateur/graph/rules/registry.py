"""Which rule handles which operator."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from secateur.graph.rules.naming import operator_name
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
                raise ValueError(
                    f"rule({name!r}): expected one rule an operator, got a second, {function.__name__}."
                )
            RULES[name] = function
        return function

    return register


UNTAGGED = frozenset(
    "arctan divide floor_divide hardswish log_sigmoid masked_fill multiply negative rsub special_expit "
    "subtract true_divide polar complex xlogy gelu abs threshold mish relu6 rrelu float_power".split()
)
"""Operators that act position by position although ATen does not tag them so."""


def find_rule(node: fx.Node) -> Rule | None:
    """The rule of a node's operator; one that acts position by position needs none of its own."""
    name = operator_name(node)
    if name in RULES:
        return RULES[name]
    return RULES["pointwise"] if _is_pointwise(node.target, name) else None


def _is_pointwise(target: object, name: str) -> bool:
    if torch.Tag.pointwise in getattr(target, "tags", ()):
        return True
    if not name.startswith("aten."):
        return False
    base = name.split(".")[1].rstrip("_")
    if base in UNTAGGED:
        return True
    packet = getattr(torch.ops.aten, base, None)  # the tag is often missing on the in-place variant
    variant = getattr(packet, name.split(".")[2], None)
    return torch.Tag.pointwise in getattr(variant, "tags", ())
