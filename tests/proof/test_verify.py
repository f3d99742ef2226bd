"""The proof: passes for what is right, and fails for what is not."""

from __future__ import annotations

import importlib
import itertools
import random
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc
from secateur.targets.units.apply import Applier
from secateur.targets.units.draws import Draws
from secateur.targets.units.module_form.module import smaller_module
from secateur.targets.units.record import Record, attach, with_repairs
from tests.graph.test_trace import assert_same, state_of
from tests.graph.tiny import Calls
from tests.helpers.models import INEXACT, TOPOLOGIES, build
from tests.helpers.traces import applier, dense, traced
from tests.targets.units.plans import plan_of, random_plan


@pytest.mark.parametrize("form", ["module", "graph", "masked"])
@pytest.mark.parametrize(
    "name", ["residual", "concat", "lstm_two_layers", "dict_output", "multi_input", "tied_linear"]
)
def test_what_is_right_passes(name: str, form: str) -> None:
    model, plan = dense(name), random_plan(traced(name))
    small = applier(name)(plan, form)  # type: ignore[arg-type]
    for inputs in (None, TOPOLOGIES[name].inputs(4, torch.float64, seed=2)):
        proof = sc.verify(model, small, plan, inputs)
        assert 0 <= proof.difference <= proof.tolerance == 1e-9
        assert proof.reference == "masked"
        assert proof.outputs == (2 if name == "dict_output" else 1)


def test_in_float64_whatever_the_model_is() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = build("residual", dtype)
        graph = sc.trace(model, TOPOLOGIES["residual"].inputs(3, dtype))
        plan, apply = random_plan(graph), Applier(model, graph)
        for form in ("module", "graph"):
            small = apply(plan, form)  # type: ignore[arg-type]
            assert sc.verify(model, small, plan).difference <= 1e-9
            assert next(small.parameters()).dtype == dtype


def test_neither_model_is_changed() -> None:
    model, graph = build("residual"), traced("residual")
    plan = random_plan(graph)
    small = sc.apply(model.train(), plan, "module", graph=graph)
    before = state_of(model), state_of(small)
    sc.verify(model, small, plan)
    assert_same(before[0], state_of(model))
    assert_same(before[1], state_of(small))


@pytest.mark.parametrize("form", ["module", "graph"])
def test_one_changed_weight_fails(form: str) -> None:
    model, graph = dense("residual"), traced("residual")
    plan = random_plan(graph)
    small = applier("residual")(plan, form)  # type: ignore[arg-type]
    with torch.no_grad():
        small.get_parameter("stem.0.weight")[0, 1, 1, 1] += 1e-6
    with pytest.raises(
        sc.VerificationError, match=r"expected the pruned Residual to equal the masked dense one to 1e-09"
    ):
        sc.verify(model, small, plan)
    assert sc.verify(model, small, plan, tolerance=1e-3).tolerance == 1e-3


def test_a_wrong_unit_fails() -> None:
    model, graph = dense("plain"), traced("plain")
    right, wrong = (plan_of(graph, {"2": np.arange(9) != gone}) for gone in (3, 4))
    with pytest.raises(sc.VerificationError, match="verify"):
        sc.verify(model, sc.apply(model, wrong, graph=graph), right)


@pytest.mark.parametrize("fill", [-1e9, torch.finfo(torch.float32).min])
def test_a_wrong_unit_fails_beside_masked_outputs(fill: float) -> None:
    torch.manual_seed(0)
    model = Calls(
        lambda m, x: m.b(m.a(x).relu()).masked_fill(x[:, :3] > 0, fill), a=nn.Linear(4, 9), b=nn.Linear(9, 3)
    )
    graph = sc.trace(model, torch.randn(6, 4))
    right, wrong = (plan_of(graph, {"a": np.arange(9) != gone}) for gone in (3, 4))
    assert sc.verify(model, sc.apply(model, right, graph=graph), right).proven
    with pytest.raises(sc.VerificationError, match="verify"):
        sc.verify(model, sc.apply(model, wrong, graph=graph), right)


def test_the_dense_model_fails() -> None:
    model, graph = dense("plain"), traced("plain")
    with pytest.raises(sc.VerificationError):
        sc.verify(model, model, random_plan(graph))


def test_other_outputs_and_nan_fail() -> None:
    model, graph = dense("dict_output"), traced("dict_output")
    plan = random_plan(graph)
    small = sc.apply(model, plan, graph=graph)
    inputs = TOPOLOGIES["dict_output"].inputs(2, torch.float64)
    fewer = Calls(lambda m, x: m.small(x)["logits"], small=small)
    with pytest.raises(sc.VerificationError, match="got inf"):
        sc.verify(model, fewer, plan, inputs)
    nan = Calls(lambda m, x: {k: v * torch.nan for k, v in m.small(x).items()}, small=small)
    with pytest.raises(sc.VerificationError):
        sc.verify(model, nan, plan, inputs)


def test_outputs_that_are_whole_numbers_are_compared_too() -> None:
    model = Calls(lambda m, x: m.b(m.a(x).relu()).argmax(-1), a=nn.Linear(3, 16), b=nn.Linear(16, 9)).double()
    x = torch.randn(200, 3, dtype=torch.float64)
    graph = sc.trace(model, x)
    plan = random_plan(graph)
    small = sc.apply(model, plan, graph=graph)
    assert sc.verify(model, small, plan, x).outputs == 1
    with torch.no_grad():
        small.b.bias.add_(torch.randn(9, dtype=torch.float64))
    with pytest.raises(sc.VerificationError):
        sc.verify(model, small, plan, x)


@pytest.mark.parametrize("name", sorted(INEXACT))
def test_inexact_plans_are_compared_with_the_program(name: str) -> None:
    """Masking zeroes what reads a unit, which is not what a norm over fewer units computes."""
    model, graph = dense(name), traced(name, allow_inexact=True)
    plan = random_plan(graph)
    exact = all(g.exact for g in graph.groups)
    proof = sc.verify(model, sc.apply(model, plan, graph=graph), plan)
    assert proof.reference == ("masked" if exact else "graph")
    assert proof.difference <= 1e-9


def test_an_inexact_group_that_loses_nothing_leaves_the_plan_exact() -> None:
    model, graph = dense("layer_norm"), traced("layer_norm", allow_inexact=True)
    plan = plan_of(graph, {"3": np.arange(9) > 3})
    assert sc.verify(model, sc.apply(model, plan, graph=graph), plan).reference == "masked"


def test_a_plan_for_another_model() -> None:
    with pytest.raises(sc.PlanError, match="expected the model it was made for"):
        sc.verify(dense("gated"), dense("gated"), random_plan(traced("mlp")))


def test_wrapped_models_and_mappings() -> None:
    model, graph = dense("multi_input"), traced("multi_input")
    plan = random_plan(graph)
    small = sc.apply(model, plan, "module", graph=graph)
    image, vector = TOPOLOGIES["multi_input"].inputs(2, torch.float64)
    proof = sc.verify(nn.DataParallel(model), small, plan, {"vector": vector, "image": image})
    assert proof.difference <= 1e-9


class VAE(nn.Module):
    """Draws noise of a width that the plan cuts."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.mu, self.lv = nn.Linear(12, 32), nn.Linear(32, 8), nn.Linear(32, 8)
        self.d, self.o = nn.Linear(8, 32), nn.Linear(32, 12)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.e(x).relu()
        mu, deviation = self.mu(h), (self.lv(h) / 2).exp()
        return self.o(self.d(mu + torch.randn_like(mu) * deviation).relu()), h.mean(1)


def two(function: Callable[[Any, Tensor], Any], **more: nn.Module) -> nn.Module:
    return Calls(function, a=nn.Linear(12, 16), b=nn.Linear(16, 3), **more)


DRAWING: dict[str, Callable[[], nn.Module]] = {
    "noise": VAE,
    "dropout": lambda: two(lambda m, x: m.b(F.dropout(m.a(x).relu(), 0.5))),
    "dropouts": lambda: two(
        lambda m, x: m.b(F.dropout(m.c(F.dropout(m.a(x).relu(), 0.5)).relu(), 0.5)), c=nn.Linear(16, 16)
    ),
    "mask by hand": lambda: two(lambda m, x: m.b(m.a(x).relu().mul(torch.rand_like(m.a(x)) > 0.5))),
    "depth": lambda: two(lambda m, x: m.b(m.a(x).relu()) * torch.empty(len(x), 1).bernoulli_(0.5)),
    "python's": lambda: two(lambda m, x: m.b(m.a(x).relu()) * random.random()),
}


def smaller(model: nn.Module, plan: sc.Plan) -> nn.Module:
    """Form `module`, without the comparison that `apply` makes."""
    return attach(smaller_module(model, plan), Record(plan, "module"))


@pytest.mark.parametrize("make", DRAWING.values(), ids=DRAWING)
def test_both_sides_draw_the_same(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = make().eval(), torch.randn(8, 12)
    plan = random_plan(sc.trace(model, x))
    small, before = smaller(model, plan), torch.get_rng_state()
    proof = sc.verify(model, small, plan, x)
    assert proof.proven, proof.doubts
    assert proof.difference <= 1e-9
    assert torch.equal(before, torch.get_rng_state())
    with torch.no_grad():
        next(small.parameters()).add_(1e-3)
    with pytest.raises(sc.VerificationError):
        sc.verify(model, small, plan, x)


def test_draws_that_cannot_be_shared_are_named() -> None:
    x = torch.randn(8, 12)
    plan = plan_of(sc.trace(two(lambda m, x: m.b(m.a(x))), x), {"a": np.arange(16) > 3})
    model = two(lambda m, x: m.b(torch.poisson(m.a(x).exp()))).eval()
    message = r"draw random numbers.* not the same ones \(poisson \[8, 12\]"
    with pytest.raises(sc.VerificationError, match=message):
        sc.verify(model, smaller(model, plan), plan, x)


class Keeps(nn.Module):
    """Adds up what it has seen, and answers with that."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 16), nn.Linear(16, 3)
        self.register_buffer("total", torch.zeros(3))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.total += self.b(self.a(x).relu()).mean(0)
        x.mul_(0.5)  # the caller's own
        return self.total * self.calls


def test_both_sides_start_from_the_same_state() -> None:
    model, x = Keeps().eval(), torch.randn(8, 12)
    plan = random_plan(sc.trace(model, x))
    small = smaller(model, plan)
    before = state_of(model), state_of(small), x.clone()
    for _ in range(2):
        assert sc.verify(model, small, plan, x).proven
    assert_same(before[0], state_of(model))
    assert_same(before[1], state_of(small))
    assert torch.equal(before[2], x)
    assert model.calls == small.calls == 0


class Auxiliary(nn.Module):
    """A second head, which only training runs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(12, 16), nn.Linear(16, 8), nn.Linear(8, 3)
        self.aux, self.drop = nn.Linear(12, 3), nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Any:
        y = self.out(self.drop(self.b(self.a(x).relu()).relu()))
        return (y, self.aux(x)) if self.training else y


def test_what_only_training_reads_is_compared_in_training_mode() -> None:
    model, x = Auxiliary().eval(), torch.randn(8, 12)
    plan = random_plan(sc.trace(model, x))
    small = smaller(model, plan)
    assert sc.verify(model, small, plan, x).training
    with torch.no_grad():
        small.aux.weight += 1
    with pytest.raises(
        sc.VerificationError, match=r"training mode in 1 of 2 outputs \(number 1\); the output of aux"
    ):
        sc.verify(model, small, plan, x)
    small.aux = nn.Linear(11, 3)
    with pytest.raises(sc.VerificationError, match=r"mat1.* in training mode, where aux.bias, aux.w"):
        sc.verify(model, small, plan, x)


def test_a_difference_at_another_size_only() -> None:
    """And what runs at the traced size only."""
    model, x = dense("mlp"), TOPOLOGIES["mlp"].inputs(4, torch.float64)
    plan = random_plan(traced("mlp"))
    right = sc.apply(model, plan, "module", graph=traced("mlp"))
    assert sc.verify(model, right, plan, x).sizes == ("input [4, 6]", "input [1, 6]")
    wrong = Calls(lambda m, x: m.net(x) * (1 if len(x) == 4 else 2), net=right)
    with pytest.raises(sc.VerificationError, match=r"at input \[1, 6\]"):
        sc.verify(model, wrong, plan, x)
    assert sc.verify(model, wrong, plan, x, other_sizes=False).sizes == ("input [4, 6]",)
    fails = Calls(lambda m, x: m.net(x).reshape(4, -1), net=right)
    with pytest.raises(sc.VerificationError, match=r"to run where the dense one does, got .* at input \[1"):
        sc.verify(model, fails, plan, x)
    refusing = attach(fails, Record(plan, "graph"))  # a captured program may say no
    proof = sc.verify(model, refusing, plan, x)
    assert proof.sizes == ("input [4, 6]",)
    assert proof.refused == ("input [1, 6]",)


def test_inputs_that_the_dense_model_refuses() -> None:
    model, plan = dense("mlp"), random_plan(traced("mlp"))
    small = sc.apply(model, plan, graph=traced("mlp"))
    with pytest.raises(
        sc.SettingError, match=r"inputs that Mlp takes, got input \[2, 5\]: RuntimeError: mat1"
    ):
        sc.verify(model, small, plan, torch.randn(2, 5), other_sizes=False)


def test_outputs_that_say_nothing() -> None:
    torch.manual_seed(0)
    model = two(lambda m, x: (m.b(m.a(x).relu()), torch.ones(len(x), 1, dtype=x.dtype))).eval()
    x = torch.randn(8, 12)
    plan = random_plan(sc.trace(model, x))
    proof = sc.verify(model, sc.apply(model, plan), plan, x)
    assert proof.proven
    assert proof.constant == (1,)
    softened = two(lambda m, x: m.b(m.a(x).relu())[:, :1].softmax(1)).eval()  # one class: always 1
    plan = random_plan(sc.trace(softened, x))
    proof = sc.verify(softened, sc.apply(softened, plan), plan, x)
    assert "all outputs are one number everywhere" in proof.doubts
    assert not proof.proven


CAUSES = {
    "trained": "Its tensor b.weight is not the dense model's tensor without the removed",
    "half": "Its tensor a.weight is not the dense model's tensor without the removed",
    "repaired": "It was repaired after apply",
    "rounding": "amplifies rounding",
    "unrepeatable": "differs by .* between two runs on the same inputs",
    "switched": "Its noisy is True, and that of the model False. .* set it before trace",
    "bug": "the output of b is the first that differs. Please report this as a bug",
}


@pytest.mark.parametrize("name", CAUSES)
def test_a_bug_is_suspected_last(name: str) -> None:
    torch.manual_seed(0)
    numbers = itertools.count()
    functions: dict[str, Callable[[Any, Tensor], Tensor]] = {
        "switched": lambda m, x: m.b(m.a(x).tanh().flip(-1) if m.noisy else m.a(x).tanh()),
        "rounding": lambda m, x: torch.sin(1e9 * m.b(m.a(x).tanh())),
        "unrepeatable": lambda m, x: m.b(m.a(x).tanh()) * float(next(numbers)),
    }
    model = two(functions.get(name, lambda m, x: m.b(m.a(x).tanh()))).eval()
    model.noisy = False
    x = torch.randn(8, 12)
    plan = random_plan(sc.trace(model, x))
    small = smaller(model, plan)
    small.noisy = name == "switched"
    if name == "bug":
        small.b.register_forward_hook(lambda *_: torch.ones(8, 3, dtype=torch.float64))
    if name == "rounding":
        small.b.register_forward_hook(lambda _, __, y: y * (1 + 2e-15))
    with torch.no_grad():
        if name == "trained":
            small.b.weight += 1
        elif name == "half":
            small.bfloat16()
        elif name == "repaired":
            small.b.bias += 1
            with_repairs(small, [{"method": "bias", "kept": True}])
    with pytest.raises(sc.VerificationError, match=CAUSES[name]) as error:
        sc.verify(model, small, plan, x, other_sizes=False)
    assert len(str(error.value)) <= 600
    assert ("bug" in str(error.value)) == (name == "bug")


def test_a_program_that_holds_numbers_of_a_dtype_is_no_bug() -> None:
    torch.manual_seed(0)
    model = (
        two(lambda m, x: (y := m.b(m.a(x).tanh())) * torch.tensor(torch.finfo(y.dtype).eps)).float().eval()
    )
    x = torch.randn(8, 12)
    graph = sc.trace(model, x)
    plan = random_plan(graph)
    assert sc.verify(model, sc.apply(model, plan, "module", graph=graph), plan, x).proven
    with pytest.raises(sc.VerificationError, match="limits of that dtype") as error:
        sc.verify(model, sc.apply(model, plan, "graph", graph=graph), plan, x)
    assert len(str(error.value)) <= 600


def test_no_reference_is_no_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where units are mixed, the captured program is what is left to compare with, and it may be refused."""
    model, graph = dense("layer_norm"), traced("layer_norm", allow_inexact=True)
    plan = random_plan(graph)
    program = sc.apply(model, plan, "graph", graph=graph)
    itself = sc.verify(model, program, plan)
    assert not itself.proven
    assert "is itself the captured program" in itself.doubts[0]
    small = sc.apply(model, plan, "module", graph=graph)
    assert sc.verify(model, small, plan).proven

    def refuse(*_: Any, **__: Any) -> nn.Module:
        raise sc.ApplyError("apply: no.")

    monkeypatch.setattr(importlib.import_module("secateur.proof.verify"), "apply", refuse)
    proof = sc.verify(model, small, plan)
    assert (proof.reference, proof.proven) == ("none", False)
    assert "the captured program is refused: apply: no" in proof.doubts[0]


class _Doubled(torch.autograd.Function):
    """A backward pass that holds the number of units."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        """Twice as much; any shape."""
        return 2 * x

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        """The gradient of that; [..., 12]."""
        return 2 * gradient.reshape(-1, 12).reshape(gradient.shape)


def test_a_backward_pass_that_fails_in_the_pruned_model_alone_is_no_proof() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 12), nn.Linear(12, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(_Doubled.apply(self.a(x)))

    model, x = Net().eval(), torch.randn(2, 4)
    plan = random_plan(sc.trace(model, x))
    small = sc.apply(model, plan, "module")
    with pytest.raises(sc.VerificationError, match=r"backward pass of the pruned Net .*reshape\(-1, 12\)"):
        sc.verify(model, small, plan)


def test_one_float64_copy_of_the_pruned_model_serves_all_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[nn.Module] = []
    compare = importlib.import_module("secateur.targets.units.compare")
    duplicate = compare.duplicate

    def counting(model: nn.Module, memo: dict[int, object]) -> nn.Module:
        copies.append(model)
        return duplicate(model, memo)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    plan = random_plan(sc.trace(model, torch.zeros(2, 4)))
    small = sc.apply(model, plan, "module")
    monkeypatch.setattr(compare, "duplicate", counting)
    assert len(sc.verify(model, small, plan).sizes) > 1
    assert copies == [small]


def test_a_copy_that_a_pass_left_changed_is_made_anew() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 12), nn.Linear(12, 3)
            self.numbers: random.Random | None = None  # its state is no part of what is put back

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.a(x).relu() * (1 + self.numbers.random() if self.numbers else 1)
            return self.b(nn.functional.dropout(h, 0.5))  # drawn again where units went: one more pass

    torch.manual_seed(0)
    model = Net().eval()
    plan = random_plan(sc.trace(model, torch.randn(2, 4)))
    small = sc.apply(model, plan, "module")
    model.numbers, small.numbers = random.Random(0), random.Random(0)
    proof = sc.verify(model, small, plan)
    assert proof.proven
    assert proof.gradients


class _Asking(nn.Module):
    """Reverses its units where gradients are on, in training mode alone if told so."""

    def __init__(self, *, in_training: bool, plain_sizes: bool = False) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 3)
        self.in_training, self.plain_sizes = in_training, plain_sizes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, 6] to [batch, 3]"""
        h = self.a(x).relu()
        if self.plain_sizes and type(x.shape[0]) is not int:  # then a trace cannot watch what runs
            raise TypeError
        if torch.is_grad_enabled() and (self.training or not self.in_training):
            h = h.flip(-1)
        return self.b(h)


def test_what_runs_in_training_with_gradients_alone_is_seen() -> None:
    torch.manual_seed(0)
    model, x = _Asking(in_training=True).eval(), torch.randn(4, 6)
    graph = sc.trace(model, x)
    assert [(group.name, group.size) for group in graph.groups] == [
        ("a", 8)
    ]  # a unit goes with its mirror image
    plan = random_plan(graph)
    small = sc.apply(model, plan, "module")
    assert sc.verify(model, small, plan).training
    masked = sc.apply(model, plan, "masked")
    torch.testing.assert_close(small.train()(x), masked.train()(x))


def test_a_model_that_asks_whether_gradients_are_on_is_named_as_the_cause() -> None:
    torch.manual_seed(0)
    model, x = _Asking(in_training=False, plain_sizes=True).eval(), torch.randn(4, 6)
    plan = random_plan(sc.trace(model, x), ratio=0.4, seed=1)
    with pytest.raises(sc.VerificationError, match=r"computes something else when gradients are on"):
        sc.verify(model, sc.apply(model, plan), plan)


def _dropout(net: nn.Module, h: torch.Tensor) -> torch.Tensor:
    return nn.functional.dropout(h, 4 / h.shape[-1], net.training)


def _scaled(net: nn.Module, h: torch.Tensor) -> torch.Tensor:
    return h * (1.0 + (1 / h.shape[-1] if net.training else 0.0))


def _momentum(net: nn.Module, h: torch.Tensor) -> torch.Tensor:
    return nn.functional.batch_norm(
        h, net.mean, net.var, training=net.training, momentum=1 / h.shape[-1]
    )  # fmt: skip


def _hooked(net: nn.Module, h: torch.Tensor) -> torch.Tensor:
    if net.training:
        h.register_hook(lambda gradient: gradient / gradient.shape[-1])
    return h


class _Counting(nn.Module):
    """Counts its units in training mode alone."""

    def __init__(self, branch: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 3)
        self.register_buffer("mean", torch.zeros(16))
        self.register_buffer("var", torch.ones(16))
        self.branch = branch

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, 6] to [batch, 3]"""
        return self.b(self.branch(self, self.a(x)).relu())


@pytest.mark.parametrize(
    ("branch", "message"),
    [
        (_dropout, "in training mode; the output of b is the first that differs"),
        (_scaled, "in training mode; the output of b is the first that differs"),
        (_momentum, "training to leave in buffer mean"),
        (_hooked, r"the gradients .* in training mode\. A backward pass of your own"),
        (lambda net, h: nn.functional.dropout(h, 0.3, net.training), ""),
        (lambda net, h: nn.functional.batch_norm(h, net.mean, net.var, training=net.training), ""),
    ],
    ids=["dropout", "scale", "momentum", "hook", "plain dropout", "plain norm"],
)
def test_what_training_counts_is_seen(branch: Callable[..., torch.Tensor], message: str) -> None:
    torch.manual_seed(0)
    model, x = _Counting(branch).eval(), torch.randn(4, 6)
    plan = random_plan(sc.trace(model, x), 0.4, 1)
    small = sc.apply(model, plan, "module")
    with pytest.raises(sc.VerificationError, match=message) if message else nullcontext():
        assert sc.verify(model, small, plan).training
    assert torch.equal(model.mean, torch.zeros(16))


class _Averaged(torch.autograd.Function):
    """A backward pass that divides by the number of units."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        """The same; any shape."""
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        """The gradient of that, over the number of units. [..., units]"""
        return gradient / gradient.shape[-1]


class _Rolled(_Averaged):
    """A backward pass that gives each unit the gradient of the one beside it."""

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        """The gradient of the next unit. [..., units]"""
        return gradient.roll(1, -1)


class _Clipped(_Averaged):
    """A backward pass of its own that treats each unit by itself."""

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        """The gradient, clipped. [..., units]"""
        return gradient.clamp(-0.01, 0.01)


@pytest.mark.parametrize("function", [_Averaged, _Rolled, _Clipped])
def test_gradients_are_compared_with_those_of_the_masked_model(function: Any) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 12), nn.Linear(12, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(function.apply(self.a(x)))

    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(2, 4)
    plan = random_plan(sc.trace(model, x))
    small = sc.apply(model, plan, "module")
    if function is _Clipped:
        assert sc.verify(model, small, plan).gradients
        return
    words = r"gradients of the pruned Net .* for a\.weight, and for 1 more, the last of them a\.bias"
    with pytest.raises(sc.VerificationError, match=words):
        sc.verify(model, small, plan)


def test_a_slope_that_hangs_on_rounding_is_no_difference() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 64), nn.Linear(64, 16), nn.Linear(16, 3)
            self.shift = nn.Parameter(torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.a(x).relu()
            zero = nn.functional.linear(h, self.b.weight) - nn.functional.linear(3 * h, self.b.weight) / 3
            return self.c(self.b(h)) + self.c((zero + self.shift).relu())

    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(9, 4)
    plan = random_plan(sc.trace(model, x))
    proof = sc.verify(model, sc.apply(model, plan, "module"), plan, x)
    assert proof.proven
    assert not proof.gradients


FLOAT = torch.zeros(1)

IN_BETWEEN: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], bool]] = {
    "nothing": (lambda m, x: x.tanh(), False),
    "cast": (lambda m, x: x.float().tanh().to(x.dtype), False),
    "cast that names no dtype": (lambda m, x: x.type_as(FLOAT).tanh().to(x.dtype), True),
    "noise": (lambda m, x: x.relu() + torch.rand_like(x), True),
    "noise of one size": (lambda m, x: x.relu() + torch.rand(1), True),
}
"""What stands between two layers, and whether operators have to be watched in evaluation mode for it."""


@pytest.mark.parametrize("name", IN_BETWEEN)
def test_operators_are_watched_only_where_needed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function, needed = IN_BETWEEN[name]
    watched: list[Draws] = []
    shared = Draws.shared
    monkeypatch.setattr(Draws, "shared", lambda self, **k: watched.append(self) or shared(self, **k))
    torch.manual_seed(0)
    model = Calls(lambda m, x: m.b(function(m, m.a(x))), a=nn.Linear(4, 9), b=nn.Linear(9, 3)).eval()
    graph = sc.trace(model, torch.randn(6, 4))
    right, wrong = (plan_of(graph, {"a": np.arange(9) != gone}) for gone in (3, 4))
    small = sc.apply(model, right, "module", graph=graph)
    watched.clear()
    proof = sc.verify(model, small, right)
    assert proof.proven
    assert proof.difference < 1e-12
    assert (proof.training, proof.gradients) == (True, True)
    assert len(watched) > 2 * len(proof.sizes) if needed else len(watched) == 2  # one in each mode
    with pytest.raises(sc.VerificationError, match="verify"):
        sc.verify(model, sc.apply(model, wrong, "module", graph=graph), right)


def test_both_models_run_once_at_each_size() -> None:
    """And once with gradients and once in training mode; a copy once, to see what a call leaves."""
    runs: list[tuple[int, ...]] = []

    def forward(m: Any, x: Tensor) -> Tensor:
        runs.append(tuple(x.shape))
        return m.b(m.a(x).relu())

    torch.manual_seed(0)
    model = Calls(forward, a=nn.Linear(4, 9), b=nn.Linear(9, 3)).eval()
    plan = random_plan(sc.trace(model, torch.randn(6, 4)))
    small = sc.apply(model, plan, "module")
    runs.clear()
    proof = sc.verify(model, small, plan)
    assert len(runs) == 2 * (len(proof.sizes) + 2) + 1
