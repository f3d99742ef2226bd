"""Copies of models share nothing with them."""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.errors import ApplyError
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


REGISTRY: dict[str, nn.Module] = {}


class Keeps(nn.Module):
    """One of its layers is reached through what `keep` makes of the model, which may be in containers."""

    def __init__(self, keep: Callable[[Any], Any]) -> None:
        super().__init__()
        self.a, self.b, self.o = nn.Linear(6, 16), nn.Linear(16, 12), nn.Linear(12, 3)
        self.kept = keep(self)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 6] to [batch, 3]."""
        step = self.kept
        while not callable(step):
            held = vars(step) if isinstance(step, types.SimpleNamespace) else step
            step = held["b"] if isinstance(held, dict) else held[0]
        out: Tensor = self.o(step(self.a(x).relu()).relu())
        return out


class Weak:
    """Calls its owner's layer without keeping the owner alive."""

    def __init__(self, owner: Any) -> None:
        self.owner = weakref.ref(owner)

    def __call__(self, h: Tensor) -> Tensor:
        """The owner's layer of `h`."""
        return self.owner().b(h)


def through_a_local_list(model: Any) -> Any:
    layers = [model.b]
    return lambda h: layers[0](h)


def through_another_function(model: Any) -> Any:
    def inner(h: Tensor, times: int = 1) -> Tensor:
        return inner(h, 0) if times else model.b(h)

    return lambda h: inner(h)


def through_a_method(model: Any) -> Any:
    method = model.b.forward
    return lambda h: method(h)


KEPT: dict[str, Callable[[Any], Any]] = {
    "list": lambda model: [lambda h: model.b(h)],
    "tuple": lambda model: (lambda h: model.b(h), 1),
    "dictionary": lambda model: {"b": lambda h: model.b(h)},
    "nested": lambda model: {"b": [(lambda h: model.b(h),)]},
    "object": lambda model: types.SimpleNamespace(b=lambda h: model.b(h)),
    "default": lambda model: lambda h, layer=model.b: layer(h),
    "keyword default": lambda model: lambda h, *, layer=model.b: layer(h),
    "partial": lambda model: functools.partial(lambda layer, h: layer(h), model.b),
    "partial function": lambda model: [functools.partial(lambda k, h: model.b(h) * k, 2.0)],
    "local list": through_a_local_list,
    "function": through_another_function,
    "method": through_a_method,
    "wrapped": lambda model: functools.wraps(model.b.forward)(lambda h: model.b(h)),
    "weak reference": Weak,
    "weak references": lambda model: [Weak(model)],
}


@pytest.mark.parametrize("kept", KEPT)
def test_a_pruned_model_uses_its_own_layers_wherever_it_keeps_them(kept: str) -> None:
    torch.manual_seed(0)
    model, x = Keeps(KEPT[kept]).double().eval(), torch.randn(4, 6).double()
    graph = sc.trace(model, x)
    plan = random_plan(graph, 0.4)
    small, masked = (sc.apply(model, plan, form, graph=graph) for form in ("module", "masked"))
    assert {group.name for group in plan.groups if group.removed} == {"a", "b"}
    assert sc.verify(model, small, plan, x).proven
    with torch.no_grad():
        wanted = masked(x)
        for parameter in model.parameters():
            parameter.zero_()
        torch.testing.assert_close(small(x), wanted)
        torch.testing.assert_close(masked(x), wanted)
        copy = duplicate(small)  # as repair does
        for parameter in small.parameters():
            parameter.zero_()
        torch.testing.assert_close(copy(x), wanted)


def through_a_global(model: Any) -> Any:
    REGISTRY["b"] = model.b
    return lambda h: REGISTRY["b"](h)


def through_a_foreign_object(model: Any) -> Any:
    class Holder:
        layer = model.b

    return lambda h: Holder.layer(h)


@pytest.mark.parametrize("keep", [through_a_global, through_a_foreign_object])
def test_a_model_that_reaches_its_layers_from_outside_is_refused(keep: Callable[[Any], Any]) -> None:
    torch.manual_seed(0)
    model, x = Keeps(keep).double().eval(), torch.randn(4, 6).double()
    graph = sc.trace(model, x)
    with pytest.raises(ApplyError, match=r"reads b\.weight of the model itself"):
        sc.apply(model, random_plan(graph, 0.4), graph=graph)
