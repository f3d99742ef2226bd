"""The captured program: what it takes, and what it says of all else."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc
from tests.targets.units.plans import random_plan


class Features(nn.Module):
    """A model with a second method, whose code holds a size."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 12)
        self.head = nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 3))

    def features(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu() + torch.tensor(range(16))).relu()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def test_methods_that_were_asked_for_do_not_get_lost() -> None:
    model, x = Features().eval(), torch.randn(4, 6)
    graph = sc.trace(model, x, methods=["features"])
    plan = random_plan(graph)
    with pytest.raises(sc.ApplyError, match="methods features"):
        sc.apply(model, plan, "graph", graph=graph)
    with pytest.raises(sc.ApplyError, match=r"got neither.*on_unrealisable='leave'"):
        sc.apply(model, plan, graph=graph)
    small = sc.apply(model, plan, graph=graph, on_unrealisable="leave")
    rest = sc.record_of(small).plan
    assert [g.name for g in rest.groups if g.removed] == ["head.0"]
    torch.testing.assert_close(small.features(x), model.features(x))


def test_a_method_that_the_program_lacks_is_an_attribute_error_in_words() -> None:
    model, x = Features().eval(), torch.randn(4, 6)
    graph = sc.trace(model, x)
    small = sc.apply(model, random_plan(graph), "graph", graph=graph)
    for program in (small, copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        with pytest.raises(AttributeError, match="captured program, got 'features'") as raised:
            program.features(x)
        assert len(str(raised.value)) < 600
        assert not hasattr(program, "features")
        assert isinstance(program.get_submodule("head"), nn.Module)


class Last(nn.Module):
    """Looks at the last twenty steps."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.o = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.a(x[:, -20:]).relu())


def test_sizes_that_are_refused_name_the_users_line() -> None:
    model = Last().eval()
    graph = sc.trace(model, torch.randn(2, 5, 6))
    small = sc.apply(model, random_plan(graph), "graph", graph=graph)
    assert small(torch.randn(3, 9, 6)).shape == (3, 9, 3)
    wanted = r"axis 1 of x <=? 20.*\(test_program\.py:\d+: return self\.o\(self\.a\(x\[:, -20:\]"
    with pytest.raises(sc.InputError, match=wanted):
        small(torch.randn(3, 25, 6))


class Auxiliary(nn.Module):
    """Returns more in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.o, self.aux = nn.Linear(6, 16), nn.Linear(16, 3), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        return self.o(h) + self.aux(h) if self.training else self.o(h)


def test_a_program_without_training_loads_into_a_model_as_its_constructor_makes_it(tmp_path: Path) -> None:
    model, x = Auxiliary().eval(), torch.randn(4, 6)
    graph = sc.trace(model, x)
    small = sc.apply(model, random_plan(graph), "graph", graph=graph)
    loaded = sc.load(sc.save(small, tmp_path), Auxiliary)  # which makes it in training mode
    assert not any(module.training for module in loaded.modules())
    assert torch.equal(loaded(x), small(x))
    with pytest.raises(sc.ApplyError, match="training mode"):
        loaded.train()
    with pytest.raises(sc.ApplyError, match="training mode"):
        sc.apply(model.train(), random_plan(graph), "graph", graph=graph)


class Lengths(nn.Module):
    """Reads its sizes in one way or another, and holds none of them."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.a, self.o = way, nn.Linear(6, 16), nn.Linear(16, 3)
        if way == "table":
            self.register_buffer("table", torch.linspace(0, 1, 32 * 16).view(32, 16))
        if way == "len":
            self.token = nn.Parameter(torch.full((1, 1, 16), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        if self.way == "table":
            h = h * self.table[: x.shape[1]]
        elif self.way == "window":
            h = h[:, : min(12, x.shape[1])]
        elif self.way == "len":
            h = torch.cat([self.token.expand(len(x), 1, -1), h], 1)
        elif self.way == "len of a row":
            h = h.flatten(0, 1).view(len(x), len(x[0]), -1)
        return self.o(h)


@pytest.mark.parametrize("way", ["table", "window", "len", "len of a row"])
def test_a_program_takes_the_sizes_that_the_model_takes(way: str) -> None:
    torch.manual_seed(0)
    model, x = Lengths(way).double().eval(), torch.randn(2, 5, 6).double()
    graph = sc.trace(model, x)
    plan = random_plan(graph)
    small, masked = (sc.apply(model, plan, form, graph=graph) for form in ("graph", "masked"))  # type: ignore[arg-type]
    for shape in ((2, 5, 6), (3, 5, 6), (2, 9, 6), (4, 4, 6)):
        other = torch.randn(shape).double()
        for training in (False, True):
            assert torch.allclose(small.train(training)(other), masked.train(training)(other), atol=1e-12)
    assert small.float()(torch.randn(3, 7, 6)).dtype == torch.float32


class Negative(nn.Module):
    """Computes with a size where autocast is off."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        with torch.autocast("cpu", enabled=False):
            turned = torch.arange(x.shape[1], device=x.device)[-(x.shape[1] - 1) :]
            h = h * turned.cos().sum()
        return self.b(h)


def test_arithmetic_on_sizes_in_an_autocast_region() -> None:
    torch.manual_seed(0)
    model, x = Negative().double().eval(), torch.randn(2, 5, 4, dtype=torch.float64)
    graph = sc.trace(model, x)
    plan = sc.Uniform(ratio=0.25).allocate(graph, sc.score(graph, None, "magnitude"))
    small, masked = sc.apply(model, plan, "graph", graph=graph), sc.apply(model, plan, "masked")
    for length in (5, 9):
        x = torch.randn(3, length, 4, dtype=torch.float64)
        torch.testing.assert_close(small(x), masked(x))


class Alone(nn.Module):
    """A network that treats a single sample in another way, which couples units."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 12), nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Gives three numbers."""
        h = self.a(x).relu()
        if x.size(0) == 1:
            h = h.flip(-1)
        return self.c(self.b(h).relu())


def test_a_program_that_refuses_what_was_traced_is_no_result() -> None:
    """One sample was traced, of which a capture makes two; a module is right for both."""
    one = torch.randn(1, 4, dtype=torch.float64)
    two = torch.cat([one, one])
    for traced in (one, two):
        model = Alone().double().eval()
        plan = random_plan(sc.trace(model, traced), 0.4, 1)
        small = sc.apply(model, plan)
        for given in (one, two):
            assert torch.allclose(small(given), sc.apply(model, plan, "masked")(given))
    model = Alone().double().eval()
    plan = random_plan(sc.trace(model, one), 0.4, 1)
    with pytest.raises(sc.ApplyError, match=r"takes inputs of the traced sizes, .* a batch of 2 or more\."):
        sc.apply(model, plan, "graph")


class Correlation(nn.Module):
    """Convolves each sample with a kernel computed from it, with a group for each sample or channel."""

    def __init__(self, each: str) -> None:
        super().__init__()
        self.each, self.kernel, self.a, self.o = (
            each,
            8 if each == "channel" else 64,
            nn.Linear(3, 8),
            nn.Linear(8, 2),
        )
        self.k = nn.Linear(3, self.kernel)

    def forward(self, x: Tensor) -> Tensor:
        h, k = self.a(x).relu().mT, self.k(x.mean(1))
        b, c, t = h.shape
        groups = b * c if self.each == "channel" else b
        k = k.view(b * c, -1, 1) if self.each == "channel" else k.view(b * 8, c, 1)
        return self.o(F.conv1d(h.reshape(1, b * c, t), k, groups=groups).view(b, -1, t).mT)


@pytest.mark.parametrize("each", ["sample", "channel"])
def test_as_many_groups_as_the_batch_has(each: str) -> None:
    torch.manual_seed(0)
    model, x = Correlation(each).double().eval(), torch.randn(2, 5, 3).double()
    graph = sc.trace(model, x)
    plan = random_plan(graph)
    assert any(group.removed for group in plan.groups)
    small, masked = (sc.apply(model, plan, form, graph=graph) for form in ("graph", "masked"))  # type: ignore[arg-type]
    for batch in (2, 1, 3, 5):
        other = torch.randn(batch, 4, 3).double()
        assert torch.allclose(small(other), masked(other), atol=1e-12)


class Backbone(nn.Module):
    """A backbone whose batch norms stay in evaluation mode, in one way or another, and a trained head."""

    def __init__(self, frozen: str) -> None:
        super().__init__()
        self.frozen = frozen
        self.a, self.n, self.b, self.m, self.o = (
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 10), nn.BatchNorm1d(10), nn.Linear(10, 3)
        )  # fmt: skip

    def train(self, mode: bool = True) -> Backbone:
        super().train(mode and self.frozen != "always")
        if self.frozen == "train":
            self.n.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        if self.frozen == "forward":
            self.n.eval()
        return self.o(self.m(self.b(self.n(self.a(x)).relu())).relu())


@pytest.mark.parametrize("frozen", ["", "train", "forward", "always"])
def test_frozen_batch_norms_stay_frozen(frozen: str) -> None:
    torch.manual_seed(0)
    model, x = Backbone(frozen).double().eval(), torch.randn(6, 4).double()
    model.n.running_mean += torch.randn(8)
    graph = sc.trace(model, x)
    plan = random_plan(graph)
    small, masked = (sc.apply(model, plan, form, graph=graph) for form in ("graph", "masked"))  # type: ignore[arg-type]
    for training in (True, True, False):
        got, wanted = (net.train(training)(x) for net in (small, masked))
        assert torch.allclose(got, wanted, atol=1e-12)
    assert torch.equal(small.m.num_batches_tracked, masked.m.num_batches_tracked)


def same_code(x: Tensor) -> Tensor:
    return x.sin()


class Choice(nn.Module):
    """Computes one of two functions, which a program holds as programs of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.o = nn.Linear(6, 16), nn.Linear(16, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cond(x.sum() > 0, same_code, torch.cos, (self.a(x),))
        return self.o(self.b(h).relu().clamp(max=torch.finfo(x.dtype).max))


@pytest.mark.parametrize("make", [Last, Choice, lambda: Lengths("table"), lambda: Lengths("window")])
def test_a_pickled_program_is_the_program(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = make().eval(), torch.randn(2, 5, 6)
    graph = sc.trace(model, x)
    small = sc.apply(model, random_plan(graph), "graph", graph=graph)
    again = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(small))))
    assert type(again).__name__ == type(model).__name__
    assert list(again.state_dict()) == list(small.state_dict())
    assert sc.record_of(again) == sc.record_of(small)
    for one in (again, copy.deepcopy(again)):
        for shape in ((2, 5, 6), (3, 9, 6), (2, 25, 6), (1, 5, 6), (2, 5, 7), (6,)):
            results: list[Tensor | str] = []
            for module in (one, small):
                try:
                    results.append(module(torch.ones(shape)))
                except sc.InputError as error:
                    results.append(str(error))
            got, wanted = results
            assert got == wanted if isinstance(wanted, str) else torch.equal(got, wanted)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["code", "graph", "meta", "accept", "recompile"])
def test_tensors_and_modules_that_are_called_as_parts_of_a_program(name: str) -> None:
    for held in (nn.Parameter(torch.ones(6)), nn.Linear(6, 6)):
        model, x = Lengths("").eval(), torch.randn(2, 5, 6)
        setattr(model, name, held)
        inner = model.forward
        model.forward = lambda x, held=held, inner=inner: inner(held(x) if callable(held) else x * held)  # type: ignore[method-assign]
        graph = sc.trace(model, x)
        with pytest.raises(sc.ApplyError, match=f"got '{name}' in Lengths"):
            sc.apply(model, random_plan(graph), "graph", graph=graph)


def test_settings_of_layers_that_no_program_reads_are_refused() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU(), nn.Conv1d(8, 4, 3, padding="same"))
    model.limits, model.note = [1, 2], {"any": [1]}  # type: ignore[assignment]
    x = torch.randn(2, 3, 9)
    graph = sc.trace(model.eval(), x)
    small = sc.apply(model, random_plan(graph), "graph", graph=graph)
    first, last = small.get_submodule("0"), small.get_submodule("2")
    for layer, name, value in (
        (first, "padding", (1,)), (first, "stride", (2,)), (first, "stride", 2), (last, "padding", "valid"),
        (small, "limits", [1, 2, 3]), (small, "note", {}),
    ):  # fmt: skip
        with pytest.raises(sc.ApplyError, match=f"^{name}: expected it to stay"):
            setattr(layer, name, value)
    first.padding, first.stride, small.limits = (0,), (1,), [1, 2]
    first.weight = nn.Parameter(first.weight * 2)
    small.mine = {"new": 1}
    assert small.train().eval()(x).shape == (2, 4, 7)


def test_parts_of_a_program_say_that_nothing_calls_them() -> None:
    model, x = Features().eval(), torch.randn(4, 6)
    graph = sc.trace(model, x)
    small = sc.apply(model, random_plan(graph), "graph", graph=graph)
    head = small.get_submodule("head")
    with pytest.raises(sc.ApplyError, match="call of the whole model"):
        head(torch.randn(4, 12))
    for register in (
        head.register_forward_hook,
        head.register_forward_pre_hook,
        head.register_full_backward_hook,
    ):
        with pytest.warns(UserWarning, match="the hook never runs"):
            register(lambda *given: pytest.fail("it ran"))
    small(x).sum().backward()


class Tied(nn.Module):
    """Two layers with one weight, and a block that is there twice, with its norm."""

    def __init__(self) -> None:
        super().__init__()
        self.i, self.t, self.u, self.o = (
            nn.Linear(6, 16),
            nn.Linear(16, 16),
            nn.Linear(16, 16),
            nn.Linear(16, 3),
        )
        self.u.weight = self.t.weight
        block = nn.Sequential(nn.Linear(16, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 16))
        self.blocks = nn.ModuleList([block, block])

    def forward(self, x: Tensor) -> Tensor:
        h = self.i(x)
        for block in self.blocks:
            h = h + block(h)
        return self.o(self.u(self.t(h).relu()).relu())


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def _untied(model: nn.Module) -> None:
    model.u.weight = nn.Parameter(model.u.weight.detach() * 3)  # type: ignore[union-attr]


def _set_in_a_shared_block(model: nn.Module) -> None:
    layer = model.get_submodule("blocks.1.0")
    layer.weight = nn.Parameter(layer.weight.detach() * 3)  # type: ignore[operator]


def _parametrized(model: nn.Module) -> None:
    nn.utils.parametrize.register_parametrization(model.t, "weight", Doubled())  # type: ignore[arg-type]


def _assigned(model: nn.Module) -> None:
    model.load_state_dict({k: v * (1 + len(k) / 9) for k, v in model.state_dict().items()}, assign=True)


def _each_module_once(model: nn.Module) -> None:
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                parameter.data.mul_(0.9)


@pytest.mark.parametrize(
    "change",
    [_untied, _set_in_a_shared_block, _parametrized, _assigned, _each_module_once],
)
def test_tied_tensors_and_shared_modules_of_a_program_are_those_of_the_model(
    change: Callable[[nn.Module], None],
) -> None:
    torch.manual_seed(0)
    model, x = Tied().double().eval(), torch.randn(4, 6).double()
    graph = sc.trace(model, x)
    plan = random_plan(graph)
    small, masked = (sc.apply(model, plan, form, graph=graph) for form in ("graph", "masked"))  # type: ignore[arg-type]
    before = small(x)
    for one in (small, copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        other = copy.deepcopy(masked)
        change(one)
        change(other)
        got, wanted = one(x), other(x)
        assert torch.allclose(got, wanted, atol=1e-12)
        assert not torch.allclose(got, before)
        assert [n for n, _ in one.named_parameters()] == [n for n, _ in other.named_parameters()]
