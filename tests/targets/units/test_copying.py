"""Copies of models share nothing with them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from secateur.targets.units.copying import duplicate


def containers(model: nn.Module) -> list[Any]:
    held = [value for module in model.modules() for value in vars(module).values()]
    return [value for value in held if isinstance(value, dict | set | list)]


def test_a_copy_has_containers_of_its_own_also_where_they_are_empty() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    model.register_forward_hook(lambda *_: None)
    copy = duplicate(model)
    ours, theirs = containers(copy), containers(model)
    assert [(type(a), len(a)) for a in ours] == [(type(b), len(b)) for b in theirs]
    assert not {id(a) for a in ours} & {id(b) for b in theirs}
    assert len({id(a) for a in ours}) == len({id(b) for b in theirs})
    seen: list[torch.Tensor] = []
    copy[0].register_forward_hook(lambda module, args, output: seen.append(output))
    model(torch.zeros(2, 3))
    assert not seen
