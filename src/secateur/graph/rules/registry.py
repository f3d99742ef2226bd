"""The rule of each operator."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from secateur.graph.rules.naming import operator_name
from secateur.graph.rules.op import Op, Value

Rule = Callable[[Op], Value]
"""A rule says which positions of an operator's inputs belong together, and returns the output's labels."""

RULES: dict[str, Rule] = {}
"""Name of an operator (``aten.conv2d.default``) -> its rule. Importing `secateur.graph.rules` fills it."""


def rule(*operators: str) -> Callable[[Rule], Rule]:
    """Register a function as the rule of these operators. Name overloads in full: ``aten.sum.default``."""

    def register(function: Rule) -> Rule:
        for name in operators:
            if name in RULES:
                raise ValueError(
                    f"rule({name!r}): expected one rule for each operator, got a second, {function.__name__}."
                )
            RULES[name] = function
        return function

    return register


UNTAGGED = frozenset(
    "arctan divide floor_divide hardswish log_sigmoid masked_fill multiply negative rsub special_expit "
    "subtract true_divide polar complex xlogy gelu abs threshold mish relu6 rrelu float_power "
    "isclose fake_quantize_per_tensor_affine special_ndtr special_erf special_erfc special_erfinv "
    "special_gammaln special_digamma special_exp2 special_expm1 special_log1p special_sinc special_round "
    "special_i0 special_logit special_xlogy special_polygamma special_gammainc special_gammaincc "
    "__and __or __xor __lshift __rshift __iand __ior __ixor __ilshift __irshift".split()
)
"""Operators that work on each position alone, although ATen does not tag them. Names end without ``_``."""


def only_asks(node: fx.Node) -> bool:
    """Whether an operator only asks for sizes or checks its inputs, so that it needs no rule."""
    name = operator_name(node)
    asks = ("aten.sym_", "aten._assert", "aten.is_", "aten._linalg_check_errors")
    return name.startswith(asks) and "nonzero" not in name


def find_rule(node: fx.Node) -> Rule | None:
    """Return the rule of a node's operator, or None. One rule serves all operators that are pointwise."""
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
