"""`sc.trace`: what it takes, what it finds, and that it leaves no trace itself."""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc
from secateur.targets.units.compare import relative_difference, run
from tests.graph.tiny import Calls, identities, reasons, traced
from tests.helpers.models import TOPOLOGIES, build
from tests.targets.units.plans import random_plan


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


# Untouched


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that a trace could move."""
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    return {
        "values": {name: t.detach().clone() for name, t in tensors.items()},
        "identities": {name: (id(t), t.data_ptr(), t.requires_grad) for name, t in tensors.items()},
        "gradients": {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()},
        "modes": [m.training for m in model.modules()],
        "hooks": [
            (list(m._forward_hooks), list(m._forward_pre_hooks), list(m._backward_hooks))
            for m in model.modules()
        ],
        "attributes": [sorted(vars(m)) for m in model.modules()],
        "random": (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()),  # noqa: NPY002
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    for key in before:
        if key in ("values", "gradients"):
            assert before[key].keys() == after[key].keys()
            for name, value in before[key].items():
                same = after[key][name] is None if value is None else torch.equal(value, after[key][name])
                assert same, f"{key} {name}"
        else:
            assert before[key] == after[key], key


@pytest.mark.parametrize("name", ["residual", "mlp", "lstm_bidirectional", "tied_linear"])
def test_the_model_is_left_as_it_was(name: str) -> None:
    model = build(name)
    model.train()
    next(m for m in model.modules() if m is not model).eval()
    first, *rest = model.parameters()
    first.requires_grad_(False)
    rest[-1].grad = torch.ones_like(rest[-1])
    calls: list[str] = []
    model.register_forward_pre_hook(lambda m, args: calls.append("before"))
    model.register_forward_hook(lambda m, args, out: calls.append("after"))
    before = state_of(model)
    graph = sc.trace(model, TOPOLOGIES[name].inputs(3, torch.float64))
    assert graph.groups
    assert_same(before, state_of(model))
    calls.clear()
    model(*TOPOLOGIES[name].inputs(3, torch.float64))
    assert calls == ["before", "after"]


def test_the_comparison_above_notices() -> None:
    model = build("mlp")
    before = state_of(model)
    model[0].bias.data[0] += 1
    with pytest.raises(AssertionError, match=r"values 0\.bias"):
        assert_same(before, state_of(model))
    model[0].bias.data.copy_(before["values"]["0.bias"])
    model[1].train()
    with pytest.raises(AssertionError, match="modes"):
        assert_same(before, state_of(model))
    model[1].eval()
    torch.rand(1)
    with pytest.raises(AssertionError, match="random"):
        assert_same(before, state_of(model))


def test_after_a_failure_too() -> None:
    model = Calls(lambda m, x: m.b(m.a(x)).tolist(), a=nn.Linear(3, 4), b=nn.Linear(4, 2)).train()
    before = state_of(model)
    with pytest.raises(sc.CaptureError):
        sc.trace(model, torch.zeros(2, 3))
    assert_same(before, state_of(model))


def test_buffers_that_the_forward_pass_writes() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.net(x)

    model = Counting()
    graph = sc.trace(model, torch.randn(2, 3))
    assert model.calls == 0
    assert [(g.name, g.size) for g in graph.groups] == [("net.0", 4)]
    small = sc.apply(model, random_plan(graph), "graph", graph=graph)
    small(torch.randn(2, 3))
    assert (model.calls, small.calls) == (0, 1)


def test_two_traces_say_the_same() -> None:
    for name in ("residual", "channel_shuffle", "lstm_two_layers", "unet"):
        first, second = (sc.trace(build(name), TOPOLOGIES[name].inputs(3, torch.float64)) for _ in range(2))
        assert str(first) == str(second)
        assert first.fingerprint == second.fingerprint
        for a, b in zip(first.groups, second.groups, strict=True):
            for one, other in zip(a.slices, b.slices, strict=True):
                assert (one.tensor, one.axis, one.role) == (other.tensor, other.axis, other.role)
                assert np.array_equal(one.position, other.position)
                assert np.array_equal(one.unit, other.unit)


# Example inputs


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_a_program_takes_any_batch(batch: int) -> None:
    model = build("residual")
    graph = sc.trace(model, TOPOLOGIES["residual"].inputs(batch, torch.float64))
    assert graph.static_batch is None
    program = sc.apply(model, random_plan(graph), "graph", graph=graph)
    for other in (1, 3):
        assert program(*TOPOLOGIES["residual"].inputs(other, torch.float64)).shape == (other, 5)


def test_a_model_for_a_single_sample() -> None:
    net = Calls(lambda m, x: m.b(F.relu(m.a(x)).view(1, -1)), a=nn.Conv2d(3, 4, 3), b=nn.Linear(16, 2))
    graph = traced(net, torch.randn(1, 3, 4, 4))
    assert graph.static_batch == 1
    assert identities(graph, ("a.weight", 0, 4)) == [[0, 1, 2, 3]]
    assert graph.cost().macs == 4 * 27 * 4 + 32


def test_a_model_that_fixes_its_batch() -> None:
    net = Calls(lambda m, x: m.b(m.a(x).view(3, 2, 4).amax(2)), a=nn.Linear(3, 8), b=nn.Linear(2, 2))
    graph = traced(net, torch.randn(3, 3))
    assert graph.static_batch == 3
    assert graph.cost().macs == 24 + 4


@pytest.mark.parametrize(
    "given",
    [
        lambda image, vector: (image, vector),
        lambda image, vector: [image, vector],
        lambda image, vector: {"image": image, "vector": vector},
        lambda image, vector: {"vector": vector, "image": image},
    ],
    ids=["tuple", "list", "mapping", "another order"],
)
def test_kinds_of_example_inputs(given: Any) -> None:
    model = build("multi_input")
    inputs = TOPOLOGIES["multi_input"].inputs(3, torch.float64)
    graph = sc.trace(model, given(*inputs))
    assert [(g.name, g.size) for g in graph.groups] == [("image.0", 7), ("side", 5)]
    plan = random_plan(graph)
    for form in ("graph", "module"):
        small = sc.apply(model, plan, form, graph=graph)
        keywords = dict(zip(("image", "vector"), inputs, strict=True))
        wanted = run(sc.apply(model, plan, "masked"), inputs, {})
        named = isinstance(given(*inputs), dict)
        got = run(small, (), keywords) if named or form == "module" else run(small, inputs, {})
        assert relative_difference(got, wanted) <= 1e-9


def test_a_tensor_is_the_only_argument() -> None:
    assert [g.name for g in sc.trace(mlp(), torch.zeros(2, 3)).groups] == ["0"]


def test_arguments_that_are_no_tensors() -> None:
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(
            self, x: list[Tensor], scale: float, mask: Tensor | None, extra: dict[str, Tensor]
        ) -> Tensor:
            y = self.net(x[0] + extra["x"]) * scale
            return y if mask is None else y * mask

    inputs = ([torch.randn(2, 3)], 2.0, None, {"x": torch.randn(2, 3)})
    model = Optional()
    graph = sc.trace(model, inputs)
    assert [g.name for g in graph.groups] == ["net.0"]
    assert sc.verify(model, sc.apply(model, random_plan(graph)), random_plan(graph)).difference <= 1e-9


@pytest.mark.parametrize("given", [3, "x", None, object()])
def test_no_example_inputs(given: Any) -> None:
    with pytest.raises(sc.SettingError, match=r"example_inputs: expected a tensor, a tuple .* got"):
        sc.trace(mlp(), given)


def test_inputs_that_a_plan_could_not_hold() -> None:
    with pytest.raises(sc.SettingError, match=r"example inputs: expected tensors, numbers, .* got complex"):
        sc.trace(mlp(), (torch.zeros(2, 3), 1j))


def test_no_model() -> None:
    with pytest.raises(sc.SettingError, match=r"model: expected a torch\.nn\.Module, got function"):
        sc.trace(lambda x: x, torch.zeros(2, 3))


def test_inputs_follow_the_model_to_its_device() -> None:
    graph = sc.trace(mlp().to("meta"), torch.zeros(2, 3))
    assert [g.size for g in graph.groups] == [4]
    assert graph.device == torch.device("meta")


# Frozen, left alone, and unknown


def test_inputs_and_outputs_are_frozen_by_name() -> None:
    net = Calls(
        lambda m, image, vector: m.a(image) + m.b(vector),
        a=nn.Linear(3, 4),
        b=nn.Linear(5, 4),
        c=nn.Linear(4, 6),
    )
    net.function = lambda m, image, vector: m.c(m.a(image)) + m.c(m.b(vector))
    graph = traced(net, torch.randn(2, 3), torch.randn(2, 5))
    entries = {(f.tensor, f.axis): (f.count, f.reason) for f in graph.frozen}
    assert entries[("a.weight", 1)][0] == 3
    assert entries[("a.weight", 1)][1].startswith("model input")
    assert entries[("b.weight", 1)][1].startswith("model input")
    assert entries[("a.weight", 1)] != entries[("b.weight", 1)]
    assert entries[("c.weight", 0)] == (6, "model output")
    assert entries[("c.bias", 0)] == (6, "model output")


def test_every_output_is_frozen() -> None:
    net = Calls(
        lambda m, x: {"h": [m.a(x)], "y": m.b(m.c(m.a(x)))},
        a=nn.Linear(3, 4),
        b=nn.Linear(5, 2),
        c=nn.Linear(4, 5),
    )
    graph = traced(net, torch.randn(2, 3))
    assert [g.name for g in graph.groups] == ["c"]


def test_parameters_that_nothing_reads() -> None:
    net = Calls(lambda m, x: m.net(x), net=mlp(), unused=nn.Linear(7, 8))
    graph = traced(net, torch.randn(2, 3))
    assert [g.name for g in graph.groups] == ["net.0"]
    assert not [f for f in graph.frozen if f.tensor.startswith("unused")]
    assert graph.cost().params == sum(p.numel() for p in net.parameters())


def test_single_units_are_left() -> None:
    net = nn.Sequential(nn.Linear(3, 1), nn.ReLU(), nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 2))
    graph = traced(net, torch.randn(2, 3))
    assert [(g.name, g.size) for g in graph.groups] == [("2", 4)]


@pytest.fixture
def unknown_operator() -> Iterator[Any]:
    library = torch.library.Library("secateur_test", "FRAGMENT")
    library.define("mystery(Tensor x) -> Tensor")
    library.impl("mystery", lambda x: x * x.flip(-1), "CompositeExplicitAutograd")
    torch.library.register_fake("secateur_test::mystery", torch.empty_like, lib=library)
    yield torch.ops.secateur_test.mystery
    library._destroy()


def test_an_unknown_operator_freezes_what_it_touches_and_nothing_else(unknown_operator: Any) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.b, self.c = nn.Linear(4, 5), nn.Linear(5, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(unknown_operator(self.b(x)))

    net = Calls(
        lambda m, x: m.d(F.relu(m.block(F.relu(m.a(x))))), a=nn.Linear(3, 4), block=Block(), d=nn.Linear(6, 2)
    )
    graph = traced(net, torch.randn(2, 3))
    assert [(g.name, g.size) for g in graph.groups] == [("a", 4), ("block.c", 6)]
    unknown = [f for f in graph.frozen if f.reason == "no rule for secateur_test.mystery.default"]
    assert {(f.tensor.removeprefix("block."), f.axis, f.count) for f in unknown} == {
        ("b.weight", 0, 5), ("b.bias", 0, 5), ("c.weight", 1, 5),
    }  # fmt: skip
    line = r"block \(test_trace\.py:\d+: return self\.c\(unknown_operator\(self\.b\(x\)\)\)\)"
    assert all(re.fullmatch(line, f.where) for f in unknown)
    assert "secateur_test.mystery.default" in str(graph)


def test_a_rule_that_fails_costs_coverage_only(monkeypatch: pytest.MonkeyPatch) -> None:
    from secateur.graph.rules import RULES

    def broken(op: Any) -> Any:
        raise KeyError("no such thing")

    def short(op: Any) -> Any:
        return tuple(axis[:1] for axis in op.axes(op["self"]))

    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5), nn.Softmax(1), nn.Linear(5, 6), nn.Linear(6, 2))
    for replacement, said in ((broken, "'no such thing'"), (short, "expected labels of shape")):
        monkeypatch.setitem(RULES, "aten.softmax.int", replacement)
        graph = traced(net, torch.randn(2, 3))
        assert [g.name for g in graph.groups] == ["0", "3"]
        (reason,) = (r for r in reasons(graph) if r.startswith("the rule for"))
        assert reason.startswith("the rule for aten.softmax.int cannot follow this call:")
        assert said in reason


def test_regions_without_gradients_are_seen_through() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = F.relu(m.a(x))
        return m.b(y)

    graph = traced(Calls(forward, a=nn.Linear(3, 4), b=nn.Linear(4, 2)), torch.randn(2, 3))
    assert identities(graph, ("a.weight", 0, 4), ("b.weight", 1, 4)) == [[0, 1, 2, 3]] * 2


# Refusals


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (lambda y: y.tolist(), "to return tensors, got none"),
        (lambda y: "text", "to return tensors, got none"),
        (lambda y: None, "to return tensors, got none"),
        (lambda y: {"n": 3}, "to return tensors, got none"),
        (lambda y: object(), "to return tensors, got none"),
    ],
)
def test_outputs_that_are_no_tensors(output: Any, message: str) -> None:
    net = Calls(lambda m, x: output(m.b(m.a(x))), a=nn.Linear(3, 4), b=nn.Linear(4, 2))
    with pytest.raises(sc.CaptureError, match=message):
        sc.trace(net, torch.randn(2, 3))


def test_inputs_of_another_shape_say_what_torch_said(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(
        sc.CaptureError,
        match=r"expected model\(\*example_inputs\) to run, got RuntimeError: mat1 and mat2 .*Check the",
    ):
        sc.trace(mlp(), torch.randn(2, 7))
    assert capsys.readouterr().err == ""


def test_a_forward_pass_that_branches_on_values(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    net = Calls(lambda m, x: m.net(x) if x.sum() > 0 else m.net(-x), net=mlp())
    assert [group.name for group in sc.trace(net, torch.randn(2, 3)).groups] == ["net.0"]
    assert capsys.readouterr().err == ""
    assert not caplog.records


def test_nothing_to_prune_shows_what_there_is() -> None:
    with pytest.raises(sc.NothingToPruneError, match=r"found none\. Every layer reads the input or writes"):
        sc.trace(nn.Linear(3, 2), torch.zeros(2, 3))
    with pytest.raises(sc.NothingToPruneError):
        sc.trace(nn.Sequential(nn.Flatten(), nn.ReLU()), torch.zeros(2, 3))


# The graph as data


def test_groups_by_name() -> None:
    graph = sc.trace(mlp(), torch.zeros(2, 3))
    assert graph["0"].size == 4
    with pytest.raises(KeyError, match=r"expected one of \['0'\]"):
        graph["1"]


def test_fingerprint_is_of_names_and_shapes() -> None:
    from secateur.graph.graph import fingerprint

    first, second = mlp(), copy.deepcopy(mlp())
    with torch.no_grad():
        second[0].weight.zero_()
    assert fingerprint(first) == fingerprint(second.half())
    assert fingerprint(first) != fingerprint(nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)))
    assert fingerprint(first) != fingerprint(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))


def test_masks_that_do_not_fit() -> None:
    graph = sc.trace(mlp(), torch.zeros(2, 3))
    with pytest.raises(sc.PlanError, match="'2': expected one of the model's 1 prunable groups"):
        graph.cost({"2": np.ones(2, bool)})
    with pytest.raises(sc.PlanError, match=r"'0': expected a mask of 4 units, got \(3,\)"):
        graph.cost({"0": np.ones(3, bool)})
