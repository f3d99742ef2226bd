"""Submodules that run as captured inside form ``module``."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.apply import regions
from secateur.apply.regions import Region
from secateur.graph.capture import capture


class Attention(nn.Module):
    """Writes its output's width as that of its input, as many do: no attribute can make it narrower."""

    def __init__(self, width: int = 12, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.size = heads, width // heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, self.size).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-1, -2) * scale).softmax(-1)
        return self.dropout(self.proj((weights @ v).transpose(1, 2).reshape(b, n, c)))


class Windows(nn.Module):
    """Attention inside windows: its batch axis is a multiple of the model's."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        return self.attention(x.reshape(b * n // 4, 4, c), scale=0.5).reshape(b, n, c)


class Swap(nn.Module):
    """Swaps the halves of its input, whose channels no tensor of its own holds."""

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=1)
        return torch.cat([b.relu(), a], dim=1)


class Net(nn.Module):
    """Blocks with a residual stream."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.stem = nn.Linear(5, 12)
        self.blocks = nn.ModuleList([block(), block()])
        self.mlp = nn.Sequential(nn.Linear(12, 10), nn.GELU(), nn.Linear(10, 12))
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head((x + self.mlp(x)).mean(1))


class Swapped(nn.Module):
    """A convolutional net that swaps halves, which may come to differ in size."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.swap = nn.Conv2d(3, 8, 3, padding=1), Swap()
        self.b, self.head = nn.Conv2d(8, 6, 3, padding=1), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.swap(self.a(x))).mean((2, 3)))


def plan_of(graph: sc.Graph, first: int = 0) -> sc.Plan:
    """Of every other group two units go, of the rest one: those from `first` on."""
    keep = {group.name: np.ones(group.size, bool) for group in graph.groups}
    for number, mask in enumerate(keep.values()):
        mask[first : first + 2 - number % 2] = False
    return sc.Plan.build(graph, keep, allocator="by hand", settings={})


def pruned(model: nn.Module, x: Tensor) -> tuple[nn.Module, sc.Plan]:
    graph = sc.trace(model, x)
    plan = plan_of(graph)
    return sc.apply(model, plan, "module", graph=graph, example_inputs=x), plan


CASES = {
    "attention": (lambda: Net(Attention), (2, 8, 5), {"blocks.0", "blocks.1"}),
    "windows": (lambda: Net(Windows), (2, 8, 5), {"blocks.0.attention", "blocks.1.attention"}),
    "swap": (Swapped, (2, 3, 6, 6), {"swap"}),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor, set[str]]:
    make, shape, captured = CASES[request.param]
    torch.manual_seed(0)
    return make().double().eval(), torch.randn(shape, dtype=torch.float64), captured


def test_only_the_submodules_whose_code_stands_in_the_way_are_captured(
    case: tuple[nn.Module, Tensor, set[str]],
) -> None:
    model, x, captured = case
    small, plan = pruned(model, x)
    record = sc.record_of(small)
    assert set(record.captured) == captured
    assert record.form == "module"
    assert type(small) is type(model)
    assert {n for n, m in small.named_modules() if isinstance(m, Region)} == captured
    assert list(small.state_dict()) == list(model.state_dict())
    assert sc.verify(model, small, plan, x).difference < 1e-12
    assert sum(p.numel() for p in small.parameters()) == plan.predicted.params


@pytest.mark.parametrize("samples", [1, 3, 5])
def test_any_batch_size(case: tuple[nn.Module, Tensor, set[str]], samples: int) -> None:
    model, x, _ = case
    small, plan = pruned(model, x)
    other = torch.randn(samples, *x.shape[1:], dtype=torch.float64)
    assert sc.verify(model, small, plan, other).difference < 1e-12


def test_traced_with_one_sample_it_takes_more(case: tuple[nn.Module, Tensor, set[str]]) -> None:
    model, x, _ = case
    small, plan = pruned(model, x[:1])
    assert sc.verify(model, small, plan, x).difference < 1e-12


def test_it_is_saved_and_loaded_bit_for_bit(case: tuple[nn.Module, Tensor, set[str]], tmp_path: Path) -> None:
    model, x, captured = case
    small, _ = pruned(model, x)
    sc.save(small, tmp_path)
    again = sc.load(tmp_path, lambda: copy.deepcopy(model))
    assert set(sc.record_of(again).captured) == captured
    assert torch.equal(again(x), small(x))


def test_it_trains_and_is_copied(case: tuple[nn.Module, Tensor, set[str]]) -> None:
    model, x, _ = case
    pruned_model, _ = pruned(model, x)
    small = copy.deepcopy(pruned_model)
    assert [type(m).__mro__[1] for m in small.modules()] == [
        type(m).__mro__[1] for m in pruned_model.modules()
    ]
    before = {k: v.clone() for k, v in small.state_dict().items()}
    small.train()
    optimiser = torch.optim.SGD(small.parameters(), lr=0.1)
    small(x).square().mean().backward()
    assert all(p.grad is not None for p in small.parameters())
    optimiser.step()
    assert any(not torch.equal(before[k], v) for k, v in small.state_dict().items())


def test_dropout_inside_follows_the_mode() -> None:
    torch.manual_seed(0)
    model = Net(Attention).double().eval()
    x = torch.randn(2, 8, 5, dtype=torch.float64)
    small, _ = pruned(model, x)
    assert torch.equal(small(x), small(x))
    small.train()
    assert not torch.equal(small(x), small(x))
    small.eval()
    assert torch.equal(small(x), small(x))


def test_plain_attributes_can_still_be_read() -> None:
    small, _ = pruned(Net(Attention).double().eval(), torch.randn(2, 8, 5, dtype=torch.float64))
    assert small.blocks[0].size == 3
    with pytest.raises(AttributeError, match="no_such"):
        _ = small.blocks[0].no_such


def test_the_note_names_them_together() -> None:
    small, _ = pruned(Net(Windows).double().eval(), torch.randn(2, 8, 5, dtype=torch.float64))
    assert "blocks.*.attention (2)" in sc.record_of(small).note


def test_the_dense_model_keeps_no_hooks(case: tuple[nn.Module, Tensor, set[str]]) -> None:
    model, x, _ = case
    pruned(model, x)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_further_plan_captures_nothing_anew(
    case: tuple[nn.Module, Tensor, set[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x, captured = case
    graph = sc.trace(model, x)
    sc.apply(model, plan_of(graph), "module", graph=graph, example_inputs=x)
    monkeypatch.setattr(regions, "capture", None)  # calling it would fail
    again = sc.apply(model, plan_of(graph, first=1), "module", graph=graph, example_inputs=x)
    assert set(sc.record_of(again).captured) == captured


@pytest.mark.parametrize(("change", "captures"), [(None, 1), ("heads", 2), ("note", 2)])
def test_submodules_that_differ_in_weights_alone_are_captured_once(
    change: str | None, captures: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, x = Net(Attention).double().eval(), torch.randn(2, 8, 5, dtype=torch.float64)
    if change == "heads":
        model.blocks[1] = Attention(heads=3).double().eval()
    elif change == "note":
        model.blocks[1].note = object()  # it may mean anything
    graph = sc.trace(model, x)
    calls = []

    def counted(*args: Any) -> Any:
        calls.append(args)
        return capture(*args)

    monkeypatch.setattr(regions, "capture", counted)
    plan = plan_of(graph)
    small = sc.apply(model, plan, "module", graph=graph, example_inputs=x)
    assert len(calls) == captures
    assert sc.verify(model, small, plan, x).difference < 1e-12


def test_nothing_outlives_the_trace(case: tuple[nn.Module, Tensor, set[str]]) -> None:
    model, x, _ = case
    graph = sc.trace(model, x)
    small = sc.apply(model, plan_of(graph), "module", graph=graph, example_inputs=x)
    gone = weakref.ref(graph)
    del graph
    gc.collect()
    assert gone() is None
    assert small(x).isfinite().all()


def test_code_of_the_model_itself_needs_form_graph() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).reshape(len(x), 6).relu())

    model, x = Root().double().eval(), torch.randn(3, 4, dtype=torch.float64)
    graph = sc.trace(model, x)
    plan = plan_of(graph)
    with pytest.raises(sc.ApplyError, match="form='graph'"):
        sc.apply(model, plan, "module", graph=graph)
    small = sc.apply(model, plan, graph=graph)
    assert sc.record_of(small).form == "graph"
    assert "'graph': a." in sc.record_of(small).note
