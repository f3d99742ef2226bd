from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import fx

from secateur.graph.rules import RULES, find_rule, operator_name, rule


def node_of(target: object) -> fx.Node:
    graph = fx.Graph()
    return graph.call_function(target, (graph.placeholder("x"),))


def test_an_operator_has_one_rule() -> None:
    with pytest.raises(ValueError, match=r"'aten\.linear\.default'.*expected one rule for each operator"):
        rule("aten.linear.default")(lambda op: None)
    assert RULES["aten.linear.default"].__name__ == "linear"


@pytest.mark.parametrize(
    "name",
    [
        "relu.default", "relu_.default", "add.Tensor", "add_.Tensor", "hardswish.default", "gelu.default",
        "__and__.Tensor", "__or__.Scalar", "__xor__.Tensor", "__ior__.Tensor", "__lshift__.Scalar",
    ],
)  # fmt: skip
def test_what_acts_position_by_position_needs_no_rule(name: str) -> None:
    packet, overload = name.split(".")
    node = node_of(getattr(getattr(torch.ops.aten, packet), overload))
    assert operator_name(node) not in RULES
    assert find_rule(node) is RULES["pointwise"]


@pytest.mark.parametrize("name", ["linalg_inv.default", "linalg_cholesky.default", "histc.default"])
def test_the_rest_has_none(name: str) -> None:
    packet, overload = name.split(".")
    assert find_rule(node_of(getattr(getattr(torch.ops.aten, packet), overload))) is None


def operators() -> Iterator[torch._ops.OpOverload]:
    """All of ATen's that take tensors by position, and numbers."""
    for name in dir(torch.ops.aten):
        packet = getattr(torch.ops.aten, name, None)
        for overload in packet.overloads() if hasattr(packet, "overloads") else ():
            operator = getattr(packet, overload)
            needed = [a for a in operator._schema.arguments if not a.has_default_value()]
            kinds = {str(a.type) for a in needed}
            if (
                "Tensor" in kinds <= {"Tensor", "number", "float", "int"}
                and not any(a.kwarg_only for a in needed)
                and find_rule(node_of(operator)) is RULES["pointwise"]
            ):
                yield operator


def test_what_counts_as_position_by_position_is() -> None:
    """Its result at some positions is that of its operands there, along every axis. Tags have been wrong."""
    tried = 0
    for operator in operators():
        needed = [a for a in operator._schema.arguments if not a.has_default_value()]
        for make in (lambda: torch.rand(4, 4) * 0.8 + 0.1, lambda: torch.randint(1, 5, (4, 4))):
            given = [make() if str(a.type) == "Tensor" else 1 for a in needed]
            try:
                whole = results(operator, given)
                parts = [
                    results(
                        operator,
                        [v.index_select(k, SOME) if isinstance(v, torch.Tensor) else v for v in given],
                    )
                    for k in (0, 1)
                ]
            except (RuntimeError, NotImplementedError, IndexError):  # not for numbers of this kind
                continue
            for k, part in enumerate(parts):
                for one, other in zip(whole, part, strict=True):
                    torch.testing.assert_close(
                        one.index_select(k, SOME),
                        other,
                        equal_nan=True,
                        msg=lambda m, o=operator: f"{o}: {m}",
                    )
            tried += 1
            break
    assert tried > 200


SOME = torch.tensor([2, 0])


def results(operator: torch._ops.OpOverload, given: list[object]) -> list[torch.Tensor]:
    """What it gives for copies of its operands."""
    found = operator(*(v.clone() if isinstance(v, torch.Tensor) else v for v in given))
    return [v for v in (found if isinstance(found, tuple) else (found,)) if isinstance(v, torch.Tensor)]


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
