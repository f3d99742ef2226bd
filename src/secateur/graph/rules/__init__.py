"""The rules of all operators: one file for each family.

Importing this package registers all rules.
"""

from secateur.graph.rules import (
    convolution,
    elementwise,
    index,
    linear,
    normalise,
    recurrent,
    reduce,
    reshape,
    select,
)
from secateur.graph.rules.naming import operator_name
from secateur.graph.rules.op import Op
from secateur.graph.rules.registry import RULES, find_rule, only_asks, rule

__all__ = [
    "RULES",
    "Op",
    "convolution",
    "elementwise",
    "find_rule",
    "index",
    "linear",
    "normalise",
    "only_asks",
    "operator_name",
    "recurrent",
    "reduce",
    "reshape",
    "rule",
    "select",
]
