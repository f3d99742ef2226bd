"""What an evaluation pass does not run: training heads and other methods."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import secateur as sc


class Auxiliary(nn.Module):
    """A head that only training uses, whose code holds a size; and a projection that only `embed` uses."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 24, 3)
        self.aux, self.out = nn.Linear(16, 4), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        h = self.a(x).relu()
        y = self.out(self.b(h).relu().mean((2, 3)))
        return (y, self.aux(h.mean((2, 3)).view(-1, 16))) if self.training else y


class Embedding(Auxiliary):
    """The same with a method of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(24, 5)

    def embed(self, x: Tensor) -> Tensor:
        return self.project(self.b(self.a(x).relu()).relu().mean((2, 3)))


def pruned(
    model: nn.Module, x: Tensor | dict[str, Tensor], **options: object
) -> tuple[nn.Module, nn.Module, sc.Graph]:
    graph = sc.trace(model, x, **options)  # type: ignore[arg-type]
    plan = sc.Uniform(ratio=0.4).allocate(graph, sc.score(graph, None, "magnitude"))
    return sc.apply(model, plan, graph=graph), sc.apply(model, plan, "masked"), graph


def test_a_head_that_only_training_uses_follows() -> None:
    torch.manual_seed(0)
    model, x = Auxiliary().double().eval(), torch.randn(4, 3, 8, 8).double()
    small, masked, graph = pruned(model, x)
    assert [g.name for g in graph.groups] == ["a", "b"]
    assert "aux.weight" in {s.tensor for s in graph["a"].slices}
    assert small.aux.in_features == small.a.out_channels == 10
    torch.testing.assert_close(small(x), masked(x))
    for ours, theirs in zip(small.train()(x), masked.train()(x), strict=True):
        torch.testing.assert_close(ours, theirs)
    sum(v.sum() for v in small(x)).backward()
    assert all(p.grad is not None for p in small.parameters())
    assert not model.training


def test_what_only_a_method_uses_follows_where_it_is_named() -> None:
    torch.manual_seed(0)
    model, x = Embedding().double().eval(), torch.randn(4, 3, 8, 8).double()
    small, masked, graph = pruned(model, x, methods=["embed"])
    assert [g.name for g in graph.groups] == ["a", "b"]
    torch.testing.assert_close(small.embed(x), masked.embed(x))
    assert small.project.in_features == 15
    assert graph.inputs.methods == ("embed",)


def test_else_its_inputs_are_kept_and_named(tmp_path: object) -> None:
    model, x = Embedding().double().eval(), torch.randn(4, 3, 8, 8).double()
    small, masked, graph = pruned(model, x)
    assert [g.name for g in graph.groups] == ["a"]
    assert {(f.tensor, f.reason) for f in graph.frozen if "feed" in f.reason} >= {
        ("b.weight", "may feed project.weight, which no captured pass reads")
    }
    torch.testing.assert_close(small.embed(x), masked.embed(x))


def test_a_plan_made_with_methods_is_applied_and_loaded_without_its_graph(tmp_path: object) -> None:
    model, x = Embedding().double().eval(), torch.randn(4, 3, 8, 8).double()
    small, _, _ = pruned(model, x, methods=["embed"])
    again = sc.apply(model, sc.record_of(small).plan)
    sc.save(again, str(tmp_path))
    loaded = sc.load(str(tmp_path), lambda: Embedding().double().eval())
    assert torch.equal(loaded.embed(x), small.embed(x))


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(sc.SettingError, match="expected a method of Auxiliary"):
        sc.trace(Auxiliary().eval(), torch.randn(2, 3, 8, 8), methods=["embed"])


class Forgetful(nn.Module):
    """Holds a layer that only its constructor names, and says what else it runs by another way."""

    def __init__(self, by_name: bool) -> None:
        super().__init__()
        self.a, self.b, self.by_name = nn.Linear(4, 8), nn.Linear(8, 3), by_name
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.b(getattr(self, "no" + "rm")(h) if self.by_name and len(x) > 9**9 else h)


class Plainly(Forgetful):
    """The same without a way to run it."""

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


@pytest.mark.parametrize(("make", "groups"), [(Forgetful, []), (Plainly, ["inner.a"])])
def test_a_layer_that_no_code_reaches_keeps_no_inputs(make: type[Forgetful], groups: list[str]) -> None:
    model = Named(make(True)).eval()
    if not groups:
        with pytest.raises(sc.NothingToPruneError, match=r"may feed inner\.norm"):
            sc.trace(model, torch.randn(2, 4))
        return
    assert [g.name for g in sc.trace(model, torch.randn(2, 4)).groups] == groups


class Named(nn.Module):
    """Names what it holds."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class TwoOptions(nn.Module):
    """Reverses its units only if there is a mask and the switch is on."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.o = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor, mask: Tensor | None = None, switch: bool = False) -> Tensor:
        h = self.a(x if mask is None else x * mask).relu()
        if switch:
            h = h * 2 if mask is None else h.flip(-1)
        return self.o(h)


def test_two_kinds_of_inputs_are_captured_together_where_that_runs_other_code() -> None:
    torch.manual_seed(0)
    model, x, mask = TwoOptions().double().eval(), torch.randn(4, 6).double(), torch.rand(4, 6).double()
    kinds = [{"x": x, "mask": mask}, {"x": x, "switch": True}]
    small, masked, graph = pruned(model, {"x": x}, more_inputs=kinds)
    assert len(graph.inputs.also) == 3
    both = {"mask": mask, "switch": True}
    for given in ({}, {"mask": mask}, {"switch": True}, both):
        torch.testing.assert_close(small(x, **given), masked(x, **given))
    assert sc.trace(model, {"x": x}, more_inputs=kinds[:1]).inputs.also[0].kwargs.keys() == {"x", "mask"}
