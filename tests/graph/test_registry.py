from __future__ import annotations

import pytest
import torch
from torch import fx

from secateur.graph.rules import RULES, find_rule, operator_name, rule


def node_of(target: object) -> fx.Node:
    graph = fx.Graph()
    return graph.call_function(target, (graph.placeholder("x"),))


def test_an_operator_has_one_rule() -> None:
    with pytest.raises(ValueError, match=r"'aten\.linear\.default'.*expected one rule an operator"):
        rule("aten.linear.default")(lambda op: None)
    assert RULES["aten.linear.default"].__name__ == "linear"


@pytest.mark.parametrize(
    "name",
    ["relu.default", "relu_.default", "add.Tensor", "add_.Tensor", "hardswish.default", "gelu.default"],
)
def test_what_acts_position_by_position_needs_no_rule(name: str) -> None:
    packet, overload = name.split(".")
    node = node_of(getattr(getattr(torch.ops.aten, packet), overload))
    assert operator_name(node) not in RULES
    assert find_rule(node) is RULES["pointwise"]


@pytest.mark.parametrize("name", ["bincount.default", "cholesky.default", "histc.default"])
def test_the_rest_has_none(name: str) -> None:
    packet, overload = name.split(".")
    assert find_rule(node_of(getattr(getattr(torch.ops.aten, packet), overload))) is None


def test_every_rule_is_of_an_operator_that_some_torch_has() -> None:
    """A mistyped name would freeze quietly; a few operators come and go between versions of torch."""
    absent = []
    for name in RULES:
        if name.startswith("aten."):
            packet, overload = name.removeprefix("aten.").split(".")
            if overload not in getattr(getattr(torch.ops.aten, packet, None), "overloads", list)():
                absent.append(name)
    assert set(absent) <= ALLOWED_TO_BE_ABSENT


ALLOWED_TO_BE_ABSENT: frozenset[str] = frozenset()
