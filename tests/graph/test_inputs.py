from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from secateur.graph.inputs import InputSpec, call_arguments


def test_round_trip_and_example() -> None:
    args = (torch.zeros(2, 3), [torch.zeros(4, dtype=torch.int64), None, 2.5], ("a", True))
    kwargs = {
        "mask": torch.zeros(2, dtype=torch.bool),
        "nested": {"x": torch.zeros(1, 2, dtype=torch.bfloat16)},
    }
    spec = InputSpec.of(args, kwargs)
    assert InputSpec.model_validate_json(spec.model_dump_json()) == spec
    made, named = spec.example(seed=3)
    assert made[0].shape == (2, 3)
    assert made[0].dtype == torch.float32
    assert made[0].std() > 0
    assert made[1][0].tolist() == [0, 0, 0, 0]
    assert made[1][1:] == [None, 2.5]
    assert made[2] == ("a", True)
    assert named["mask"].dtype == torch.bool
    assert named["nested"]["x"].dtype == torch.bfloat16
    again, _ = spec.example(seed=3)
    other, _ = spec.example(seed=4)
    assert torch.equal(made[0], again[0])
    assert not torch.equal(made[0], other[0])
    assert spec.example(dtype=torch.float64)[0][0].dtype == torch.float64


def test_examples_leave_the_random_state_alone() -> None:
    spec = InputSpec.of((torch.zeros(2, 3),), {})
    before = torch.get_rng_state()
    spec.example()
    assert torch.equal(before, torch.get_rng_state())


def test_data_only() -> None:
    with pytest.raises(ValidationError):
        InputSpec.model_validate_json('{"args": [{"kind": "code", "value": "x"}]}')
    with pytest.raises(ValidationError):
        InputSpec.model_validate_json('{"args": [], "more": 1}')


def test_call_arguments() -> None:
    x = torch.zeros(2)
    assert call_arguments(x) == ((x,), {})
    assert call_arguments([x, 1]) == ((x, 1), {})
    assert call_arguments({"x": x}) == ((), {"x": x})
    (moved,), named = call_arguments([x], torch.device("meta"))
    assert (moved.device.type, named) == ("meta", {})
    _, named = call_arguments({"x": [x]}, torch.device("meta"))
    assert named["x"][0].device.type == "meta"
