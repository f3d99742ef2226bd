"""Float64 wherever Python code names a shorter dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from secateur.targets.units.doubling import calls_in_double

CASTS: dict[str, Callable[[Tensor], Tensor]] = {
    "float": lambda x: x.float(),
    "half": lambda x: x.half(),
    "bfloat16": lambda x: x.bfloat16(),
    "cfloat": lambda x: x.cfloat(),
    "to": lambda x: x.to(torch.float32),
    "to by name": lambda x: x.to(dtype=torch.float16),
    "to a device too": lambda x: x.to("cpu", torch.float32),
    "type": lambda x: x.type(torch.float32),
    "softmax": lambda x: torch.softmax(x, -1, dtype=torch.float32),
    "sum": lambda x: x.sum(-1, dtype=torch.float32),
    "factory": lambda x: torch.zeros(3, dtype=torch.bfloat16) + x,
    "default": lambda x: torch.ones(3),
    "operator": lambda x: torch.ops.aten._to_copy.default(x, dtype=torch.float32),
    "complex": lambda x: torch.complex(x, x).to(torch.complex64),
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_casts_in_python_code_give_float64(cast: Callable[[Tensor], Tensor]) -> None:
    x = torch.rand(2, 3, dtype=torch.float64)
    with calls_in_double():
        y = cast(x)
    assert y.dtype in (torch.float64, torch.complex128)
    assert torch.get_default_dtype() == torch.float32


def test_other_dtypes_stay() -> None:
    x = torch.rand(2, 3, dtype=torch.float64)
    with calls_in_double():
        assert x.to(torch.int32).dtype == torch.int32
        assert (x > 0).to(dtype=torch.bool).dtype == torch.bool


def test_nothing_is_compiled_inside() -> None:
    compiled: list[Any] = []

    def backend(program: torch.fx.GraphModule, _: Any) -> Any:
        compiled.append(program)
        return program.forward

    double = torch.compile(lambda x: 2 * x, backend=backend)
    with calls_in_double():
        assert double(torch.ones(2)).tolist() == [2, 2]
    assert not compiled
    double(torch.ones(2))  # the compiler itself is as before
    assert compiled
