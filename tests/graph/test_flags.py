"""Flags: attributes that the code of a forward pass reads."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from secateur.graph.flags import Reader, attributes_of, changed, flags_of, value_of


def helper(module: Any, h: Tensor) -> Tensor:
    return h * 2 if module.config.doubled else h


class Net(nn.Module):
    shared = False

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.mode, self.level, self.never, self.limit = "plain", 1, False, None
        self.config = SimpleNamespace(doubled=False, unread=True)

    def unused(self) -> bool:
        """Not called by forward."""
        return self.never

    @property
    def computed(self) -> bool:
        """Has no setter."""
        return False

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 3] to the same."""
        h = helper(self, self.a(x))
        if self.mode in ("fast", "slow") or self.level > 3 or self.shared or self.computed:
            h = h + 1
        return h if self.limit is None else h.clamp(max=self.limit)


def test_the_values_that_the_code_names() -> None:
    model, x = Net(), torch.zeros(2, 3)
    found = {str(flag) for flag in flags_of(model, lambda: model(x))}
    assert found == {
        "model.config.doubled = True",
        "model.mode = 'fast'",
        "model.mode = 'slow'",
        "model.level = 2",
        "model.level = 3",
        "model.level = 4",
        "model.shared = True",
        "model.limit = 'fast'",  # None may stand for a name
        "model.limit = 'slow'",
    }


def test_a_flag_is_set_inside_alone() -> None:
    model, x = Net(), torch.zeros(2, 3)
    before = dict(vars(model)), dict(vars(model.config))
    for flag in flags_of(model, lambda: model(x)):
        with flag.on(model):
            assert value_of(model, flag.readers[0].chain) == flag.value
        assert value_of(model, flag.readers[0].chain) == flag.now[0]
    assert (dict(vars(model)), dict(vars(model.config))) == before


def test_what_changed_since() -> None:
    model = nn.Sequential(Net(), Net())
    before = attributes_of(model)
    assert changed(model, before) == []
    model[1].config.doubled = True
    model[0].level = True  # equal to 1, and another type
    found = changed(model, before)
    assert {flag.readers[0] for flag in found} == {
        Reader("0", ("level",)),
        Reader("1", ("config", "doubled")),
    }
    assert value_of(model, ("0", "limit", "nothing")) is None
