"""A model is after a block as it was before, whatever its forward pass does."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.common.models import evaluating
from secateur.common.preserving import State, preserved

SEEN: dict[str, Tensor] = {}


class Memory:
    """An object that a model keeps, no module."""

    def __init__(self) -> None:
        self.last: Tensor | None = None
        self.all: list[Tensor] = []
        self.mean = torch.zeros(3)


class Keeping(nn.Module):
    """Keeps what it computes in every place that Python offers."""

    shared: Tensor | None = None
    table: dict[str, Any] = {}  # noqa: RUF012 what people write

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("maybe", None)
        self.number, self.plain, self.written = 0, None, torch.zeros(2)
        self.items: list[Any] = [1]
        self.queue: deque[Any] = deque(maxlen=2)
        self.nested: dict[str, list[Any]] = {"a": []}
        self.names = {"x"}
        self.memory, self.space = Memory(), SimpleNamespace(last=None)
        self.generator = torch.Generator().manual_seed(0)
        self.hidden = [nn.Linear(3, 3)]  # in no module dictionary

    def forward(self, x: Tensor) -> Tensor:
        x -= 1
        h = self.norm(self.linear(x))
        self.calls += h.sum()  # with its history
        self.mean = 0.9 * self.mean + 0.1 * h.mean(0)
        self.maybe = h.detach()
        self.register_buffer("late", h.detach())
        self.number += 1
        self.plain = self.hidden[0].last = h
        self.written.data.add_(1)
        self.items.append(h)
        self.queue.append(h)
        self.nested["a"].append(h)
        self.nested["b"] = [h]
        self.names.add("y")
        self.memory.last = self.space.last = h
        self.memory.all.append(h)
        self.memory.mean += 1
        type(self).shared = h
        self.table["x"] = SEEN["x"] = h
        self.made = nn.Linear(3, 3)
        self.linear.weight.requires_grad_(False)
        self.linear.register_forward_hook(lambda *_: None)
        self.norm.weight = nn.Parameter(torch.zeros(3))
        self.hidden[0] = nn.Identity()
        return h + torch.rand(3, generator=self.generator)


def held(value: Any, path: str = "", seen: set[int] | None = None) -> dict[str, Any]:
    """What a value holds, by path: an independent, slow way to look."""
    seen = set() if seen is None else seen
    if isinstance(value, Tensor):
        found: dict[str, Any] = {path: (id(value), value.requires_grad, value.tolist())}
        return found
    if isinstance(value, torch.Generator):
        return {path: value.get_state().tolist()}
    if isinstance(value, int | float | str | type(None)):
        return {path: value}
    if id(value) in seen:
        return {path: id(value)}
    seen.add(id(value))
    inside: dict[Any, Any] = {}
    if isinstance(value, dict):
        inside = dict(value)
    elif isinstance(value, list | tuple | deque | set):
        inside = dict(enumerate(sorted(value) if isinstance(value, set) else value))
    elif isinstance(value, nn.Module | Memory | SimpleNamespace):
        inside = dict(vars(value))
    found = {path: (id(value), type(value))}
    for key, part in inside.items():
        found |= held(part, f"{path}.{key}", seen)
    return found


def everything(net: Keeping) -> dict[str, Any]:
    return held(net) | held(Keeping.shared, "shared") | held(Keeping.table, "table")


def test_everything_that_a_forward_pass_keeps_is_put_back() -> None:
    net, x = Keeping(), torch.randn(4, 3)
    before, given = everything(net), x.clone()
    with preserved(net):
        net(x.clone())
        assert everything(net) != before
    assert everything(net) == before

    def failing() -> None:
        with evaluating(net):
            net(x)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()
    assert everything(net) == before
    assert torch.equal(x, given)


def test_closures_and_globals_are_put_back_where_that_is_asked_for() -> None:
    net = Keeping()
    features: dict[str, Tensor] = {}
    count = 0

    def hook(*_: Any) -> None:
        nonlocal count
        count += 1
        features["x"] = torch.zeros(count)

    net.linear.register_forward_hook(hook)
    SEEN.clear()
    with preserved(net, functions=True):
        net(torch.randn(4, 3))
    assert (count, features, SEEN) == (0, {}, {})
    with preserved(net):
        net(torch.randn(4, 3))
    assert (count, len(features), len(SEEN)) == (1, 1, 1)
    SEEN.clear()


def test_a_class_attribute_under_another_name_is_put_back() -> None:
    class Net(nn.Module):
        cache = None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    state = State(Net())
    del Net.cache
    Net.other = None  # the same values in the same order
    assert state.restore()
    assert (hasattr(Net, "cache"), hasattr(Net, "other")) == (True, False)
    assert not state.restore()


def test_restore_says_whether_anything_had_changed() -> None:
    net = Keeping()
    state = State(net)
    assert not state.restore()
    net(torch.randn(4, 3))
    assert state.restore()
    assert not state.restore()


@pytest.mark.parametrize("change", ["swapped", "resized", "in inference mode", "not a number"])
def test_tensors_keep_their_storage_and_values(change: str) -> None:
    net = nn.Module()
    with torch.inference_mode(change == "in inference mode"):
        net.register_buffer("b", torch.arange(4.0))
    if change == "not a number":
        net.b[0] = torch.nan
    buffer, place, value = net.b, net.b.data_ptr(), net.b.clone()
    with preserved(net):
        if change == "swapped":
            net.b.data = torch.ones(7, dtype=torch.float64)
        elif change == "resized":
            net.b.resize_(9).fill_(1)
        else:
            with torch.inference_mode():
                net.b += 1
    assert net.b is buffer
    assert (net.b.dtype, net.b.shape) == (torch.float32, (4,))
    assert change == "resized" or net.b.data_ptr() == place
    assert torch.equal(net.b.nan_to_num(), value.nan_to_num())


def test_a_renormalised_embedding_is_put_back() -> None:
    net = nn.Embedding(4, 3, max_norm=0.1)
    before = net.weight.detach().clone()
    with evaluating(net):
        net(torch.arange(4))
        assert not torch.equal(net.weight, before)
    assert torch.equal(net.weight, before)


def test_a_model_on_the_meta_device_and_one_of_half_a_million_entries_are_seen() -> None:
    net = Keeping().to("meta")
    net.items = list(range(500_000))
    with preserved(net):
        net.items.append(1)
        net.calls = None
    assert len(net.items) == 500_000
    assert net.calls is not None


def test_copies_of_inputs_keep_what_is_one_tensor_one() -> None:
    class Same(nn.Module):
        def forward(self, x: Tensor, pair: dict[str, list[Tensor]]) -> bool:
            x += 1
            pair["y"].clear()
            return x is pair["z"][0]

    net, x = Same(), torch.zeros(3)
    pair = {"y": [x], "z": [x]}
    with evaluating(net):
        assert net(x, pair=pair)
    assert float(x.sum()) == 0
    assert len(pair["y"]) == 1


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is")
def test_scripted_and_exported_modules_can_be_evaluated() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout()).train()
    exported = torch.export.export(net.eval(), (torch.zeros(2, 3),)).module()
    net.train()
    for model in (torch.jit.script(net), exported):
        with evaluating(model):
            assert not model.training
            assert model(torch.ones(2, 3)).shape == (2, 3)
        assert model.training


@pytest.mark.parametrize("fails", [False, True])
def test_trace_leaves_no_tensor_without_data(fails: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.o = nn.Linear(6, 32), nn.Linear(32, 3)

        def forward(self, x: Tensor) -> Tensor:
            self.features = self.a(x).relu()
            if fails and self.features.sum() > 0:
                return self.features
            return self.o(self.features)

    net = Net().eval()
    if fails:
        with pytest.raises(sc.NothingToPruneError):
            sc.trace(net, torch.randn(4, 6))
    else:
        sc.trace(net, torch.randn(4, 6))
    assert not hasattr(net, "features")
