"""Numbers are set where they are meant, and nowhere else."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.targets.units.module_form.configuration import (
    built_from,
    numbers_of,
    quietly,
    set_number,
    set_numbers,
)
from tests.targets.units.module_form.test_reading import Config, Model, Part


class Pair(nn.Module):
    """A model whose first part holds a copy of the configuration, its second the configuration itself."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.first, self.second, self.third = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
        self.first.config, self.second.config = copy.deepcopy(config), config  # type: ignore[assignment]
        self.third.config = copy.deepcopy(config)  # type: ignore[assignment]
        self.third.config.wide = 20


def test_copies_follow_as_far_as_they_say_the_same() -> None:
    model: Any = Pair(Config())
    set_numbers(model, {"wide": 8, "widths.1": 7, "part.width": 5, "head_dim": 3})
    for part in (model, model.first, model.second):
        assert (part.config.wide, part.config.part.width, part.config.head_dim) == (8, 5, 3)
        assert part.config.widths == [10, 7]
    assert model.third.config.wide == 20
    two: Any = Pair(Config())
    two.config.other = Part(12)  # of the same class and size: not known which of them a copy is of
    two.first.config = Part(12)
    set_numbers(two, {"part.width": 5})
    assert (two.config.part.width, two.config.other.width, two.first.config.width) == (5, 12, 12)


def test_only_numbers_of_the_configuration_are_set() -> None:
    config = Config()
    with pytest.raises(sc.ArtefactError, match="field of a configuration"):
        set_number(config, "__class__.wide", 3)
    with pytest.raises(sc.ArtefactError, match="field of a configuration"):
        set_number(config, "part.__dict__", 3)
    found = dict(numbers_of(config))
    assert {"wide", "ratio", "widths.0", "widths.1", "part.width", "some_id"} <= set(found)
    assert "inner" not in found


def test_a_model_is_built_around_the_tensors_of_another() -> None:
    small = Model(Config()).half()
    small.register_buffer("steps", torch.zeros(2, dtype=torch.float16), persistent=False)

    class Stepping(Model):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.register_buffer("steps", torch.tensor([1.5, 2.5]), persistent=False)

    state = torch.get_rng_state()
    with quietly():
        built: Any = built_from(Stepping, Config(), small)
    assert torch.equal(torch.get_rng_state(), state)
    for name, tensor in small.state_dict().items():
        assert built.state_dict()[name].data_ptr() == tensor.data_ptr()
    assert built.steps.tolist() == [1.5, 2.5], "what the class computes is its own"
    assert built.steps.dtype == torch.float16
