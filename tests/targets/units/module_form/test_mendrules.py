"""Sizes that the user's code holds as numbers, mended at the call; attributes that change by evidence."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc
from secateur.targets.units.module_form.mended import MendedMethod


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


class Divided(nn.Module):
    """Divides a size that it reads off a tensor by its number of heads: only the quotient stays."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.ModuleList([nn.Linear(12, 12) for _ in range(3)])
        self.proj = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        split = [layer(x) for layer in self.qkv]
        q, k, v = (y.reshape(*y.shape[:2], 4, y.shape[-1] // 4).transpose(1, 2) for y in split)
        return self.proj(((q @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(1, 2).flatten(2))


class Windows(nn.Module):
    """Attention inside windows: its batch axis is a multiple of the model's."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        return self.attention(x.reshape(b * n // 4, 4, c), scale=0.5).reshape(b, n, c)


class Scaled(Attention):
    """Computes its scale from the width that it reads off its input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x, (x.shape[-1] // self.heads * x.shape[1]) ** -0.5) / x.shape[-1]


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
    "divided": (lambda: Net(Divided), (2, 8, 5), {"blocks.0", "blocks.1"}),
    "scaled": (lambda: Net(Scaled), (2, 8, 5), {"blocks.0", "blocks.1"}),
    "windows": (lambda: Net(Windows), (2, 8, 5), {"blocks.0.attention", "blocks.1.attention"}),
    "swap": (Swapped, (2, 3, 6, 6), {"swap"}),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor, set[str]]:
    make, shape, captured = CASES[request.param]
    torch.manual_seed(0)
    return make().double().eval(), torch.randn(shape, dtype=torch.float64), captured


@pytest.mark.parametrize("block", [Attention, Scaled])
def test_code_may_write_a_size_that_stays_as_one_that_shrinks(block: type[nn.Module]) -> None:
    """The width of the stream shrinks, that inside of attention does not."""
    torch.manual_seed(0)
    model, x = Net(block).double().eval(), torch.randn(2, 8, 5, dtype=torch.float64)
    graph = sc.trace(model, x)
    stream = next(group for group in graph.groups if "stem" in group.name)
    keep = {g.name: np.arange(g.size) > (1 if g is stream else -1) for g in graph.groups}
    plan = sc.Plan.build(graph, keep, allocator="by hand", settings={})
    small = sc.apply(model, plan, "module", graph=graph)
    for shape in ((2, 8, 5), (1, 3, 5), (3, 11, 5)):
        x = torch.randn(shape, dtype=torch.float64)
        torch.testing.assert_close(small(x), sc.apply(model, plan, "masked")(x))
    assert sc.verify(model, small, plan).proven


def test_only_the_modules_whose_code_holds_a_size_are_mended(
    case: tuple[nn.Module, Tensor, set[str]],
) -> None:
    model, x, captured = case
    small, plan = pruned(model, x)
    record = sc.record_of(small)
    assert set(record.captured) == captured
    assert record.form == "module"
    assert type(small) is type(model)
    assert {
        n for n, m in small.named_modules() if isinstance(vars(m).get("forward"), MendedMethod)
    } == captured
    assert [type(m) for m in small.modules()] == [type(m) for m in model.modules()]
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
    copied = [vars(m)["forward"].module is m for m in small.modules() if "forward" in vars(m)]
    assert copied
    assert all(copied)
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


def test_the_note_names_them_together() -> None:
    small, _ = pruned(Net(Windows).double().eval(), torch.randn(2, 8, 5, dtype=torch.float64))
    assert "blocks.*.attention (2)" in sc.record_of(small).note


def test_the_dense_model_keeps_no_hooks(case: tuple[nn.Module, Tensor, set[str]]) -> None:
    model, x, _ = case
    before = [dict(vars(m)) for m in model.modules()]
    pruned(model, x)
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert [dict(vars(m)).keys() for m in model.modules()] == [b.keys() for b in before]
    for module, held in zip(model.modules(), before, strict=True):
        assert {k: type(v) for k, v in vars(module).items()} == {k: type(v) for k, v in held.items()}


class Literals(nn.Module):
    """Every kind of call that can hold a size, each with numbers written into the code."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv1d(3, 16, 1), nn.Conv1d(16, 12, 1), nn.Conv1d(12, 8, 1)
        self.depth = nn.Parameter(torch.randn(16, 1, 3))
        self.d, self.out = nn.Linear(8, 24), nn.Linear(10, 2)
        self.mix = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        n, _, length = x.shape
        h = self.a(x) * x.new_full((16, 1), 0.5) + torch.zeros(16, 1).to(x)
        h = F.conv1d(h, self.depth, padding=1, groups=16)
        h = F.pad(h[:, :12], (0, 0, 0, 4)) + h
        h = self.b(h)
        left, right = h.split([5, 7], 1)
        h = self.c(torch.cat([right, left], 1))
        h = h.view(n, 8, length).expand(n, 8, -1).transpose(1, 2)
        first, second = self.d(h).chunk(2, -1)
        h = torch.cat([second[..., :12], first.narrow(-1, 0, 12)], -1)
        h = torch.index_select(h, -1, torch.arange(24).flip(0))
        h = self.mix(h).roll(3, -1)
        return self.out(torch.reshape(h, (n, length, 10)).relu())


def test_calls_of_every_kind() -> None:
    torch.manual_seed(0)
    model, x = Literals().double().eval(), torch.randn(2, 3, 6, dtype=torch.float64)
    graph = sc.trace(model, x)
    rng = np.random.default_rng(0)
    assert len(graph.groups) >= 6
    for _ in range(5):
        keep = {g.name: rng.permutation(g.size) >= max(1, g.size // 3) for g in graph.groups}
        plan = sc.Plan.build(graph, keep, allocator="by hand", settings={})
        small, masked = (sc.apply(model, plan, form, graph=graph) for form in ("module", "masked"))
        for shape in ((2, 3, 6), (1, 3, 9), (5, 3, 4)):
            y = torch.randn(shape, dtype=torch.float64)
            torch.testing.assert_close(small(y), masked(y), rtol=1e-11, atol=1e-11)


class Coincidence(nn.Module):
    """Three attributes of one value, of which one is the size that shrinks."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.longest, self.classes = 12, 12, 12
        self.sizes, self.heads = [3, 4], 3
        self.a, self.b, self.c = nn.Linear(6, 12), nn.Linear(12, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, -self.longest :]
        h = self.a(x).relu().view(len(x), -1, *self.sizes).flatten(2).view(len(x), -1, self.hidden)
        return self.c(self.b(h).relu().mean(1))


def test_an_attribute_changes_only_where_its_value_reaches_a_size_that_shrinks() -> None:
    torch.manual_seed(0)
    model, short, long = Coincidence().double().eval(), torch.randn(2, 7, 6), torch.randn(2, 20, 6)
    graph = sc.trace(model, short.double())
    plan = sc.Uniform(ratio=0.4).allocate(graph, sc.score(graph, None, "magnitude"))
    small, masked = sc.apply(model, plan, graph=graph), sc.apply(model, plan, "masked")
    assert (small.longest, small.classes, small.heads) == (12, 12, 3)
    assert small.hidden == small.a.out_features < 12
    for x in (short.double(), long.double()):
        torch.testing.assert_close(small(x), masked(x))


class Root(nn.Module):
    """The code of the model itself holds a size."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)
        self.config = {"name": "mine"}

    def forward(self, x: Tensor, times: int = 1) -> Tensor:
        return self.b(self.a(x).reshape(len(x), 6).relu()) * times

    def predict(self, x: Tensor) -> Tensor:
        return self(x, times=2).argmax(-1)


def test_a_model_whose_own_code_holds_a_size_keeps_its_class_and_methods() -> None:
    model, x = Root().double().eval(), torch.randn(3, 4, dtype=torch.float64)
    small, plan = pruned(model, x)
    assert type(small) is Root
    assert small.config == {"name": "mine"}
    assert list(inspect.signature(small.forward).parameters) == ["x", "times"]
    masked = sc.apply(model, plan, "masked")
    assert torch.equal(small.predict(x), masked.predict(x))
    torch.testing.assert_close(small(x[:1], times=3), masked(x[:1], times=3))


def test_a_mended_model_is_exported_with_open_axes() -> None:
    model, x = Net(Attention).double().eval(), torch.randn(2, 8, 5, dtype=torch.float64)
    small, _ = pruned(model, x)
    auto = torch.export.Dim.AUTO
    program = torch.export.export(small, (x,), dynamic_shapes=({0: auto, 1: auto},), strict=False)
    y = torch.randn(3, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(program.module()(y), small(y))


@pytest.mark.filterwarnings("ignore:.*torch.jit.")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # of the models' own code
@pytest.mark.parametrize("name", [*CASES, "literals", "root"])
def test_torch_jit_trace_gives_the_same_numbers(name: str) -> None:
    """Tracing makes tensors of the sizes that code reads off tensors."""
    make, shape, _ = {**CASES, "literals": (Literals, (2, 3, 6), {}), "root": (Root, (2, 4), {})}[name]
    torch.manual_seed(0)
    model, x = make().double().eval(), torch.randn(shape, dtype=torch.float64)
    small, _ = pruned(model, x)
    digits = 1e-7 if name == "scaled" else 1e-12  # there, numbers computed from sizes have single precision
    for samples in (2, 3):
        y = torch.randn(samples, *shape[1:], dtype=torch.float64)
        traced = torch.jit.trace(small, (y,), check_trace=False)
        torch.testing.assert_close(traced(y), small(y), rtol=digits, atol=digits)
        z = torch.randn(samples + 3, *shape[1:], dtype=torch.float64)
        try:
            dense = torch.jit.trace(model, (y,), check_trace=False)(z)
        except RuntimeError:
            continue  # where tracing fixes the batch of the dense model, too
        assert dense.shape == traced(z).shape
        torch.testing.assert_close(traced(z), small(z), rtol=digits, atol=digits)


@pytest.mark.filterwarnings("ignore:.*torch.jit.")
def test_torch_jit_script_is_refused_in_words() -> None:
    small, _ = pruned(Root().eval(), torch.randn(3, 4))
    with pytest.raises(sc.ApplyError, match=r"Use torch.jit.trace or torch.export"):
        torch.jit.script(small)


class Twice(nn.Module):
    """One line that would have to say two sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:2]:
            x = layer(x).reshape(len(x), 6).relu()
        return self.layers[2](x)


def test_a_line_that_would_have_to_say_two_sizes_is_refused_by_name() -> None:
    model, x = Twice().eval(), torch.randn(3, 4)
    graph = sc.trace(model, x)
    keep = {g.name: np.arange(g.size) > k for k, g in enumerate(graph.groups)}
    plan = sc.Plan.build(graph, keep, allocator="by hand", settings={})
    with pytest.raises(sc.ApplyError, match="one size for every run of a line"):
        sc.apply(model, plan, "module", graph=graph)


class Split(nn.Module):
    """Splits each layer's result in two; of the last, nothing reads the second part."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 12), nn.Linear(8, 12)])

    def forward(self, x: Tensor) -> Tensor:
        first = torch.zeros(len(x), 4, dtype=x.dtype)
        if x.shape[0] > 4:
            first = first.abs()
        for layer in self.layers:
            both = layer(x).relu()
            first = first + both[:, :4].cumsum(1)
            x = both[:, -8:]
        return first


def test_a_run_whose_result_nothing_reads_does_not_stop_the_others() -> None:
    torch.manual_seed(0)
    model, x = Split().double().eval(), torch.randn(3, 4, dtype=torch.float64)
    graph = sc.trace(model, x)
    plan = sc.Plan.build(graph, {"layers.0": np.arange(8) > 1}, allocator="by hand", settings={})
    small = sc.apply(model, plan, "module", graph=graph)
    assert sc.verify(model, small, plan, x).difference < 1e-12
    assert small.layers[1].in_features == 6
