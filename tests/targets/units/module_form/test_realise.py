"""What a module cannot express is named, or left whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc
from secateur.targets.units.module_form import realise
from tests.targets.units.plans import random_plan


class HalfHardCoded(nn.Module):
    """Three hidden layers; the code writes a number down for each unit of the middle one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 8), nn.Linear(8, 6)
        self.third, self.last = nn.Linear(6, 7), nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.second(F.relu(self.first(x)))) * torch.tensor([1.0, 2, 3, 4, 5, 6]).to(x)
        return self.last(F.relu(self.third(x)))


def test_auto_names_the_groups_that_need_the_program() -> None:
    model, x = HalfHardCoded().double().eval(), torch.randn(4, 3).double()
    graph = sc.trace(model, x)
    small = sc.apply(model, random_plan(graph), graph=graph, example_inputs=x)
    assert sc.record_of(small).form == "graph"
    assert sc.record_of(small).note.startswith("groups that need form 'graph': second.")


def test_they_can_be_left_whole() -> None:
    model, x = HalfHardCoded().double().eval(), torch.randn(4, 3).double()
    graph = sc.trace(model, x)
    plan = random_plan(graph)
    small = sc.apply(model, plan, graph=graph, example_inputs=x, on_unrealisable="leave")
    record = sc.record_of(small)
    assert isinstance(small, HalfHardCoded)
    assert record.note.startswith("left whole: groups that need form 'graph': second.")
    assert [g.kept == g.size for g in record.plan.groups] == [False, True, False]
    assert record.plan.keep["first"].tolist() == plan.keep["first"].tolist()
    assert sc.verify(model, small, record.plan, x).difference <= 1e-9


class Repeated(nn.Module):
    """Equal blocks one after the other; `sound` of them, in the middle, can be expressed as modules."""

    def __init__(self, count: int, sound: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)) if k in sound else HalfHardCoded()
            for k in range(count)
        )
        self.into = nn.ModuleList(nn.Linear(2, 3) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for layer, into in zip(self.layers, self.into, strict=True):
            x = into(layer(x)) if isinstance(layer, HalfHardCoded) else into(layer(F.pad(x, (0, 3)))[..., :2])
        return x


def test_equal_layers_are_judged_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first and the last speak for all layers of their kind."""
    trials: list[int] = []
    true = realise.proven_module
    monkeypatch.setattr(realise, "proven_module", lambda *a, **k: trials.append(1) or true(*a, **k))
    model, x = Repeated(12, sound=(5,)).double().eval(), torch.randn(4, 3).double()
    graph = sc.trace(model, x)
    plan = random_plan(graph)
    small = sc.apply(model, plan, graph=graph, example_inputs=x, on_unrealisable="leave")
    whole = {g.name for g, asked in zip(sc.record_of(small).plan.groups, plan.groups, strict=True)
             if g.kept == g.size and asked.kept < asked.size}  # fmt: skip
    assert whole == {f"layers.{k}.second" for k in range(12) if k != 5}
    assert len(trials) < 12


class Doubtful(nn.Module):
    """As many heads as a head has dimensions: the constant 4 is two attributes, only one of which changes."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_size = 4, 4
        self.q, self.k, self.v = nn.Linear(5, 16), nn.Linear(5, 16), nn.Linear(5, 16)
        self.out = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            f(x).view(x.shape[0], x.shape[1], self.num_heads, self.head_size).transpose(1, 2)
            for f in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(x.shape[0], x.shape[1], -1))


def test_a_size_that_two_attributes_share_is_settled_by_a_forward_pass() -> None:
    model, x = Doubtful().double().eval(), torch.randn(2, 3, 5).double()
    graph = sc.trace(model, x)
    assert [g.size for g in graph.groups] == [4]
    small = sc.apply(model, random_plan(graph), graph=graph, example_inputs=x)
    assert sc.record_of(small).form == "module"
    assert (small.num_heads, small.head_size) == (3, 4)


def test_size_attributes_are_saved(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model, x = Doubtful().eval(), torch.randn(2, 3, 5)
    graph = sc.trace(model, x)
    small = sc.apply(model, random_plan(graph), graph=graph, example_inputs=x)
    sc.save(small, tmp_path)
    again = sc.load(tmp_path, lambda: Doubtful().eval())
    assert again.num_heads == 3
    assert torch.equal(again(x), small(x))


def test_the_program_trains_and_exports() -> None:
    model, x = HalfHardCoded(), torch.randn(4, 3)
    graph = sc.trace(model, x)
    program = sc.apply(model, random_plan(graph), "graph", graph=graph, example_inputs=x).train()
    before = program.first.weight.detach().clone()
    optimizer = torch.optim.SGD(program.parameters(), lr=0.1)
    F.cross_entropy(program(x), torch.tensor([0, 1, 0, 1])).backward()
    optimizer.step()
    assert all(p.grad is not None for p in program.parameters())
    assert not torch.equal(program.first.weight, before)
    exported = torch.export.export(program.eval(), (x,)).module()
    assert torch.equal(exported(x), program(x))


class Cast(nn.Module):
    """A model in float64 that computes in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 200), nn.Linear(200, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).relu().float()
        return F.linear(h, self.last.weight.float(), self.last.bias.float()).double()


def test_rounding_of_a_shorter_dtype_is_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = Cast().double().eval(), torch.randn(4, 6).double()
    graph = sc.trace(model, x)
    plan = random_plan(graph)
    small = sc.apply(model, plan, graph=graph, example_inputs=x)
    assert sc.record_of(small).form == "module"
    rounding = (small(x) - sc.apply(model, plan, "masked")(x)).abs().max()
    assert rounding > 1e-9
    assert sc.verify(model, small, plan, x).proven
    monkeypatch.setattr(realise, "run_in_double", lambda *_, **__: [torch.randn(4, 3)])
    with pytest.raises(sc.ApplyError, match="got a relative difference"):
        sc.apply(model, plan, "module", graph=graph, example_inputs=x)


class Asking(nn.Module):
    """As attention of Transformers: a mask is left out where nothing is hidden, but not in an export."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.key, self.last = nn.Linear(6, 16), nn.Linear(6, 1), nn.Linear(16, 3)
        self.repeats = 16

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is None and torch.compiler.is_exporting():
            mask = torch.ones_like(x[:, :1])
        key = self.key(x)
        if mask is not None:
            key = key.expand(len(x), self.repeats) * mask
        return self.last(self.queries(x) * key)


def test_what_the_model_runs_in_an_export_alone_is_right_elsewhere_too() -> None:
    torch.manual_seed(0)
    model, x = Asking().double().eval(), torch.randn(4, 6).double()
    graph = sc.trace(model, x)
    plan = random_plan(graph)
    small = sc.apply(model, plan, "module", graph=graph, example_inputs=x)
    assert small.repeats == plan.groups[0].kept < 16
    mask = torch.tensor([[1.0], [0.0], [1.0], [0.5]]).double()
    torch.testing.assert_close(small(x, mask), sc.apply(model, plan, "masked")(x, mask), rtol=1e-9, atol=1e-9)
    assert not torch.compiler.is_exporting()
    assert sc.trace(small, x).groups[0].size == plan.groups[0].kept


class Tolerant(nn.Module):
    """A table of ten places: where it is too short, the code catches PyTorch's error and goes on without."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 3)
        self.table = nn.Parameter(torch.randn(10, 16))

    def forward(self, x: Tensor) -> Tensor:
        """[batch, length, 6] to [batch, length, 3]."""
        x = self.first(x)
        try:
            x = x + self.table[torch.arange(x.shape[1])]
        except IndexError:
            x = x * 2
        return self.last(x.view(*x.shape[:2], -1).tanh())


def test_a_call_that_raises_and_is_caught() -> None:
    torch.manual_seed(0)
    model, x = Tolerant().double().eval(), torch.randn(4, 6, 6).double()
    graph = sc.trace(model, x)
    plan = random_plan(graph)
    small, masked = (
        sc.apply(model, plan, form, graph=graph, example_inputs=x) for form in ("module", "masked")
    )
    for length in (6, 3, 15):
        x = torch.randn(2, length, 6).double()
        torch.testing.assert_close(small(x), masked(x))
