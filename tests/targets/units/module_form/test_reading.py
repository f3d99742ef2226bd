"""A class says which numbers of its configuration give a smaller model's shapes."""

from __future__ import annotations

import copy
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import nn

from secateur.targets.units.module_form.reading import Builds, read_configuration, shapes_of


class Part:
    """A configuration inside another one."""

    def __init__(self, width: int = 12) -> None:
        self.width = width

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


class Config:
    """One number of every kind."""

    def __init__(self) -> None:
        self.hidden_size, self.num_attention_heads, self.num_layers = 12, 4, 2
        self.wide, self.ratio, self.times = 12, 2.0, 4
        self.widths = [10, 12]
        self.inner: int | None = None
        self.part = Part()
        self.some_id = 12

    def to_dict(self) -> dict[str, Any]:
        held = copy.deepcopy(vars(self))
        return {**held, "part": held["part"].to_dict()}

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "times" and not isinstance(value, int):
            raise TypeError(f"Field 'times' expected int, got {value}")
        if name == "wide" and value % 2:
            raise ValueError("many words\nValueError: wide has to be even.")
        super().__setattr__(name, value)


class Model(nn.Module):
    """Its sizes follow from a configuration in every way."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        hidden = config.hidden_size
        size = getattr(config, "head_dim", hidden // config.num_attention_heads)
        self.heads = nn.Linear(hidden, config.num_attention_heads * size)
        self.layers = nn.ModuleList(nn.Linear(hidden, config.wide) for _ in range(config.num_layers))
        self.ratio = nn.Linear(hidden, int(config.ratio * hidden))
        self.times = nn.Linear(hidden, config.times * hidden)
        self.several = nn.ModuleList(nn.Linear(hidden, width) for width in config.widths)
        self.inner = nn.Linear(hidden, config.inner or 3 * hidden)
        self.part = nn.Linear(hidden, config.part.width)
        self.alone = nn.Linear(hidden, 16)


class FromTensors(Model):
    """Reads numbers out of a tensor while it is made, which none without data has."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.rates = torch.linspace(0, 1, config.num_layers).tolist()


def asked(kind: type[nn.Module] = Model, **sizes: int) -> Any:
    """Read the configuration for a model in which these layers have these sizes."""
    wanted = shapes_of(Model(Config()))
    for layer, size in sizes.items():
        layer = layer.replace("_", ".")
        wanted |= {f"{layer}.weight": (size, 12), f"{layer}.bias": (size,)}
    return read_configuration(Builds(kind, Config()), wanted)


@pytest.mark.parametrize("kind", [Model, FromTensors])
@pytest.mark.parametrize(
    ("sizes", "changes"),
    [
        ({}, {}),
        ({"layers_0": 8, "layers_1": 8}, {"wide": 8}),
        ({"times": 24}, {"times": 2}),
        ({"ratio": 7}, {"ratio": pytest.approx(7 / 12)}),
        ({"several_1": 7}, {"widths.1": 7}),
        ({"several_0": 4, "several_1": 7}, {"widths.0": 4, "widths.1": 7}),
        ({"inner": 11}, {"inner": 11}),
        ({"part": 5}, {"part.width": 5}),
        ({"part": 5, "layers_0": 8, "layers_1": 8}, {"part.width": 5, "wide": 8}),
    ],
)
def test_every_kind_of_number(kind: type[nn.Module], sizes: dict[str, int], changes: dict[str, Any]) -> None:
    assert asked(kind, **sizes).options[0] == changes


@pytest.mark.parametrize(
    ("heads", "width", "options"),
    [
        (4, 6, ({"head_dim": 3, "num_attention_heads": 2},)),  # no whole number of columns is half of three
        (6, 6, ({"head_dim": 2, "num_attention_heads": 3}, {"head_dim": 1})),
        (4, 4, ({"head_dim": 1},)),
    ],
)
def test_whole_heads_come_before_smaller_ones(heads: int, width: int, options: Any) -> None:
    config = Config()
    config.num_attention_heads = heads
    wanted = {**shapes_of(Model(config)), "heads.weight": (width, 12), "heads.bias": (width,)}
    assert read_configuration(Builds(Model, config), wanted).options == options


def test_the_reason_is_named() -> None:
    uneven = asked(layers_0=8, layers_1=10).gap
    assert (uneven.paths, uneven.uneven) == (("wide",), True)
    assert uneven.reason == "can only be the same in all layers, which keep 8 and 10"
    assert asked(layers_0=8).gap.uneven
    refused = asked(layers_0=9, layers_1=9).gap
    assert (refused.paths, refused.reason) == (("wide",), "wide has to be even")
    whole = asked(times=30).gap
    assert (whole.paths, whole.step) == (("times",), Fraction(1, 4))
    assert "expected int, got 2.5" in whole.reason
    nothing = asked(alone=9, layers_0=8, layers_1=10).gap
    assert nothing.paths == ()
    assert set(nothing.axes) == {("alone.weight", 0), ("alone.bias", 0)}


def test_a_class_that_cannot_be_made_from_it() -> None:
    class Needy(Model):
        def __init__(self, config: Any, more: int) -> None:
            super().__init__(config)

    wanted = shapes_of(Model(Config()))
    found = read_configuration(Builds(Needy, Config()), wanted)
    assert found.options == ()
    assert "Needy(config) fails" in found.gap.reason
    found = read_configuration(Builds(Model, Config()), {**wanted, "more.weight": (3, 3)})
    assert found.options == ()
    assert "other tensors: more.weight" in found.gap.reason
