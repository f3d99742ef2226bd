"""Copies of models share nothing with them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import secateur as sc
from secateur.targets.units.copying import duplicate
from tests.targets.units.plans import random_plan


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


@torch.no_grad()
def test_functions_and_hooks_made_with_a_part_of_the_model_work_on_that_of_the_copy() -> None:
    class Made(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 12)
            self.c, self.o = nn.Linear(12, 16), nn.Linear(16, 3)
            self.back = lambda h, scale=2.0: self.c(self.b(h).relu()) * scale
            self.seen: list[Tensor] = []
            self.a.register_forward_hook(lambda module, args, output: self.seen.append(output))

        def forward(self, x: Tensor) -> Tensor:
            self.seen.clear()
            h = self.a(x).relu()
            return self.o(h + self.back(h) + self.seen[0])

    torch.manual_seed(0)
    model, x = Made().double().eval(), torch.randn(4, 6).double()
    wanted = model(x)
    copy = duplicate(model)
    for parameter in copy.parameters():
        parameter.zero_()
    assert not bool(copy(x).any())
    assert len(copy.seen) == 1
    assert copy.seen is not model.seen
    torch.testing.assert_close(model(x), wanted)
    graph = sc.trace(model, x)
    plan = random_plan(graph, 0.4, 0)
    small, masked = (sc.apply(model, plan, form, graph=graph) for form in ("module", "masked"))
    torch.testing.assert_close(small(x), masked(x))
    assert sc.verify(model, small, plan).proven


def test_a_function_that_holds_nothing_of_the_model_is_shared() -> None:
    scale, model = torch.rand(3), nn.Linear(3, 3)
    model.scaled = lambda x: x * scale
    assert duplicate(model).scaled is model.scaled
